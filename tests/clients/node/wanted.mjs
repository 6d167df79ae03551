// What all clients ask for: a form so bounded that the smallest model fills it, and soon.
import assert from "node:assert/strict";
import { z } from "zod";

const word = z.string().regex(/^[A-Z][a-z]{2,9}$/);

export const Town = z.object({ name: word, country: word, size: z.enum(["small", "large"]) });
export const Question = z.object({ town: word });
export const text = "Paris is a large town in France.";
export { assert };
