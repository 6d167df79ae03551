// Has Node's clients talk to an API: `node main.mjs URL MODEL NAME...`, as tests/clients/__main__.py does it.
const [url, model, ...names] = process.argv.slice(2);

async function talk(name) {
  const client = await import(`./${name}_client.mjs`);
  await client.talk(url, model);
}

const talks = names.map(async (name) => {
  const error = await talk(name).then(
    () => null,
    (error) => error.stack,
  );
  console.log(JSON.stringify({ client: name, error }));
});
await Promise.all(talks);
