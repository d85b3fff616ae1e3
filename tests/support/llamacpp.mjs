// node llamacpp.mjs MODEL < {"texts": [...], "prompts": [[id, ...], ...], "tokens": N, "adapter": PATH or null}
// -> {"ids": [[...]], "answers": [[...]], "ends": [...], "template": "..."}: what a real llama.cpp makes of a GGUF file, greedily.
import fs from "node:fs";
import { getLlama } from "node-llama-cpp";

const asked = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath: process.argv[2] });
const ids = (asked.texts ?? []).map((text) => model.tokenize(text, false));
const answers = [];
for (const prompt of asked.prompts ?? []) {
  const lora = asked.adapter ? { lora: { adapters: [{ filePath: asked.adapter }] } } : {};
  const context = await model.createContext({ contextSize: 512, threads: 1, ...lora });
  const answer = [];
  for await (const token of context.getSequence().evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    answer.push(token);
    if (model.isEogToken(token) || answer.length >= asked.tokens) break;
  }
  answers.push(answer);
  await context.dispose();
}
const metadata = model.fileInfo.metadata.tokenizer;
const ends = metadata.ggml.tokens.map((_, id) => id).filter((id) => model.isEogToken(id));
process.stdout.write(JSON.stringify({ ids, answers, ends, template: metadata.chat_template ?? null }));
process.exit(0);
