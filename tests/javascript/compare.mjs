// Run every ONNX file of a directory in transformers.js, without a network:
//     node compare.mjs FOLDER PIXELS.json IMAGE ...
// Print JSON: the pixel values that transformers.js prepares for the images, and by dtype, the most likely label of each
// image, and the logits of the pixel values in the file.
import { readFileSync } from "node:fs";
import { AutoModel, AutoProcessor, env, ImageClassificationPipeline, RawImage, Tensor } from "@huggingface/transformers";

env.allowRemoteModels = false;
const [folder, pixelsFile, ...images] = process.argv.slice(2);
const { dims, values } = JSON.parse(readFileSync(pixelsFile));
const pixels = new Tensor("float32", Float32Array.from(values), dims);

const processor = await AutoProcessor.from_pretrained(folder);
const prepared = await processor(await Promise.all(images.map((image) => RawImage.read(image))));
const results = { prepared: Array.from(prepared.pixel_values.data), labels: {}, logits: {} };
for (const dtype of ["fp32", "fp16", "q8"]) {
  const model = await AutoModel.from_pretrained(folder, { dtype });
  const classifier = new ImageClassificationPipeline({ task: "image-classification", model, processor });
  const predictions = await classifier(images, { top_k: 1 });
  results.labels[dtype] = predictions.map(([first]) => first.label);
  const { logits } = await model({ pixel_values: pixels });
  results.logits[dtype] = Array.from(logits.data);
}
console.log(JSON.stringify(results));
