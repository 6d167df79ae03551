// Curves over the last minutes, with axes and units; whoever points at one reads the values of that time.
import { el, renew, svg } from "./dom.js";

const HEIGHT = 150, LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 22;
// A reading may be late: so many missing points are no gap.
const BRIDGED = 2;

export class Chart {
  // series: [{key, label, of}], `of` names a curve of the document; `say` makes words of a value.
  constructor(title, series, say, { floor = 1, ceiling = Infinity } = {}) {
    Object.assign(this, { title, series, say, floor, ceiling, at: null });
    this.keys = el("ul", { class: "keys" });
    this.drawing = svg("svg", { role: "img", "aria-label": title });
    this.element = el("figure", { class: "chart" }, el("div", { class: "head" }, el("h3", {}, title), this.keys), this.drawing);
    this.drawing.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.drawing.addEventListener("pointerleave", () => this.point(null));
  }

  update(curves) {
    this.curves = curves;
    this.draw();
  }

  point(x) {
    this.at = x;
    if (this.curves) this.draw();
  }

  draw() {
    const width = Math.max(240, this.drawing.clientWidth || 560);
    const series = this.series.filter(({ of }) => of in this.curves);
    const values = series.map(({ of }) => this.curves[of]);
    const num = this.curves.ends_s.length;
    const most = Math.max(this.floor, ...values.flat().filter((value) => value !== null));
    const top = Math.min(this.ceiling, rounded(most));
    const x = (i) => LEFT + (i / (num - 1)) * (width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
    const parts = [...this.axes(width, top, y)];
    const i = this.at === null ? null : Math.round(Math.min(1, Math.max(0, (this.at - LEFT) / (width - LEFT - RIGHT))) * (num - 1));
    if (i !== null) parts.push(svg("line", { class: "at", x1: x(i), x2: x(i), y1: TOP, y2: HEIGHT - BOTTOM }));
    series.forEach(({ key }, n) => parts.push(...line(values[n], key, x, y, series.length === 1)));
    const isEmpty = values.flat().every((value) => value === null);
    if (isEmpty) parts.push(svg("text", { x: (LEFT + width) / 2, y: HEIGHT / 2 - 20, "text-anchor": "middle" }, "nothing in the last ten minutes"));
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.drawing.replaceChildren(...parts);
    this.legend(series, values, i);
  }

  *axes(width, top, y) {
    for (const share of [0, 0.5, 1]) {
      yield svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(top * share), y2: y(top * share) });
      yield svg("text", { x: LEFT - 8, y: y(top * share) + 4, "text-anchor": "end" }, this.say(top * share));
    }
    const minutes = Math.round((this.curves.ends_s.length * this.curves.slot_s) / 60);
    for (const [share, words, anchor] of [[0, `${minutes} min ago`, "start"], [0.5, `${minutes / 2} min`, "middle"], [1, "now", "end"]]) {
      yield svg("text", { x: LEFT + share * (width - LEFT - RIGHT), y: HEIGHT - 6, "text-anchor": anchor }, words);
    }
  }

  legend(series, values, i) {
    const told = values.map((of) => (i === null ? latest(of) : of[i]));
    const words = told.map((value) => (value === null || value === undefined ? "–" : this.say(value)));
    renew(this.keys, ...series.map(({ key, label }, n) => el("li", { class: `k-${key}` }, `${label} `, el("b", {}, words[n]))));
    if (i === null) {
      const now = series.map(({ label }, n) => `${label} ${words[n]}`).join(", ");
      this.drawing.setAttribute("aria-label", `${this.title} over the last ten minutes; latest: ${now}`);
    }
  }
}

const latest = (values) => values.slice(-3).findLast((value) => value !== null);

// 1, 2, 4, 5 or 10 times a power of ten: half of it is a plain number, too.
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((step) => step * power).find((step) => step >= value * 0.9999);
}

function* line(values, key, x, y, isFilled) {
  const runs = [[]];
  let missing = 0;
  values.forEach((value, i) => {
    missing = value === null ? missing + 1 : 0;
    if (value !== null) runs.at(-1).push([x(i), y(value)]);
    else if (missing > BRIDGED && runs.at(-1).length) runs.push([]);
  });
  for (const run of runs.filter((run) => run.length)) {
    const points = run.map((point) => point.map((part) => part.toFixed(1)).join(" "));
    if (run.length === 1) {
      yield svg("circle", { class: `dot k-${key}`, cx: run[0][0], cy: run[0][1], r: 2.5 });
      continue;
    }
    if (isFilled) yield svg("path", { class: `area k-${key}`, d: `M${run[0][0]} ${y(0)} L${points.join(" L")} L${run.at(-1)[0]} ${y(0)} Z` });
    yield svg("path", { class: `line k-${key}`, d: `M${points.join(" L")}` });
  }
}
