/* Computes off the page's thread: decodes a picture, preprocesses it as the model's image processor, runs the network.

The page posts {id, task, ...}. The worker answers {id, result} or {id, error}, and {progress} while it loads. An error
is a sentence for the visitor. */

const BUNDLES = { // files of onnxruntime-web, which bundles the JavaScript of its WebAssembly
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};
const STRIP = 256; // rows of a picture that are read at once
const PRECISION_BITS = 22; // of Pillow's weights for 8-bit pixels
const PROCESSORS = /^(Bit|CLIP|DeiT|ViT)ImageProcessor(Fast|Pil)?$/; // they resize, crop, rescale and normalize
const CROPPING = /^(Bit|CLIP|DeiT)/; // these crop unless their file says otherwise

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Pillow's filters by the number of `resample`: their support, and the weight at a distance
const FILTERS = {
  1: [3, (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, (x) => cubic(Math.abs(x))], // bicubic
  4: [0.5, (x) => (-0.5 < x && x <= 0.5 ? 1 : 0)], // box
  5: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)], // Hamming
};

function cubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

class Sentence extends Error {} // for the visitor

let network = null; // what `open` loaded

async function open({ model, size, device, threads, runtime, settings, channels }) {
  check(settings, channels);
  if (typeof WebAssembly !== "object") {
    throw new Sentence("This browser has no WebAssembly, which the network needs: allow it, or use another browser.");
  }
  if (device === "webgpu") await findAdapter();
  const ort = await loadRuntime(runtime, device, threads);
  const bytes = await loadModel(model, size);
  let session;
  try {
    session = await ort.InferenceSession.create(bytes, { executionProviders: [device] });
  } catch (error) {
    if (device === "webgpu") throw error;
    throw new Sentence(`${model} is damaged, or needs another runtime: upload it again. (${brief(error)})`);
  }
  network = { ort, session, settings, channels };
  const { height, width } = planSizes(64, 64, settings);
  await run(new Float32Array(channels * height * width), height, width); // compiles, and finds what fails
  return { threads: ort.env.wasm.numThreads, version: runtime.version, isolated: self.crossOriginIsolated };
}

/** Asks for a graphics card. A software adapter is many times slower than WebAssembly. */
async function findAdapter() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Sentence("this browser finds no graphics card.");
  if (adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter) {
    throw new Sentence("this browser's WebGPU computes in software.");
  }
}

async function loadRuntime({ url, version, files }, device, threads) {
  const [module, binary] = await Promise.all(
    BUNDLES[device].map(async (name) => {
      const address = new URL(name, new URL(url, self.location.href));
      let response;
      try {
        response = await fetch(address, { integrity: files[name], mode: "cors", credentials: "same-origin" });
      } catch {
        throw new Sentence(
          `${name} cannot be loaded from ${address.host}, or is not that of onnxruntime-web ${version}: check the ` +
            "connection, and reload the page.",
        );
      }
      return response.arrayBuffer();
    }),
  );
  const address = URL.createObjectURL(new Blob([module], { type: "text/javascript" }));
  const ort = await import(address); // its threads import it again, so the address stays
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = binary;
  if (threads) ort.env.wasm.numThreads = threads; // by default, half of the cores, at most 4
  return ort;
}

async function loadModel(name, size) {
  let response;
  try {
    response = await fetch(name);
  } catch {
    throw new Sentence(`${name} cannot be loaded: check the connection, and reload the page.`);
  }
  if (!response.ok) throw new Sentence(`${name} is missing beside this page (${response.status}): upload it again.`);
  const bytes = new Uint8Array(size);
  let loaded = 0;
  for (let reader = response.body.getReader(), chunk; !(chunk = await reader.read()).done; ) {
    if (loaded + chunk.value.length <= size) bytes.set(chunk.value, loaded);
    loaded += chunk.value.length;
    self.postMessage({ progress: { loaded, size } });
  }
  if (loaded !== size) throw new Sentence(`${name} is damaged, it has ${loaded} of ${size} bytes: upload it again.`);
  return bytes;
}

/** Checks that the page computes what the image processor of the model does. */
function check(settings, channels) {
  const type = settings.image_processor_type ?? settings.feature_extractor_type;
  const size = settings.size ?? {};
  const isKnownSize = size.shortest_edge > 0 || (size.height > 0 && size.width > 0);
  const problem =
    (!PROCESSORS.test(type) && `the type ${type}`) ||
    ((!isKnownSize || size.longest_edge) && `the size ${JSON.stringify(size)}`) ||
    (!FILTERS[settings.resample ?? 3] && `resample ${settings.resample}`) ||
    (settings.do_pad && "do_pad");
  if (problem) {
    throw new Sentence(`This page does not compute ${problem} in preprocessor_config.json: use the model in Python.`);
  }
  if (channels !== 1 && channels !== 3) {
    throw new Sentence(`The network takes ${channels} channels, pictures have 3 or, in gray, 1: use it in Python.`);
  }
}

/** Returns the picture as the network takes it: its 8-bit pixels (H, W, C), and the pixel values (C, H, W). */
async function preprocess(file, settings, channels) {
  const bitmap = await createImageBitmap(file, {
    imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none",
  });
  try {
    const plan = planSizes(bitmap.width, bitmap.height, settings);
    const pixels = resize(bitmap, plan, channels, settings.resample ?? 3);
    return { ...plan, pixels, values: normalize(pixels, plan, channels, settings) };
  } finally {
    bitmap.close();
  }
}

/** Returns the size of the resized picture, and the window of it that the network sees, as transformers does. */
function planSizes(width, height, settings) {
  const { shortest_edge: edge, height: rows, width: columns } = settings.size;
  let size = { width, height };
  if (settings.do_resize ?? true) {
    const scale = (side) => Math.trunc((edge * side) / Math.min(width, height));
    size = edge ? { width: scale(width), height: scale(height) } : { width: columns, height: rows };
  }
  const type = settings.image_processor_type ?? settings.feature_extractor_type;
  const crop = (settings.do_center_crop ?? CROPPING.test(type)) && settings.crop_size;
  return {
    resized: size,
    width: crop ? crop.width : size.width,
    height: crop ? crop.height : size.height,
    left: crop ? Math.floor((size.width - crop.width) / 2) : 0,
    top: crop ? Math.floor((size.height - crop.height) / 2) : 0,
  };
}

/** Resizes a picture as Pillow does, bit by bit: columns, then rows. Computes the window alone. Black surrounds it. */
function resize(bitmap, { resized, width, height, left, top }, channels, resample) {
  const across = weigh(bitmap.width, resized.width, left, width, resample);
  const down = weigh(bitmap.height, resized.height, top, height, resample);
  const used = down.filter((each) => each.weights.length);
  const first = used[0].start;
  const last = Math.max(...used.map((each) => each.start + each.weights.length));
  const columns = new Uint8ClampedArray((last - first) * width * channels);
  for (let row = first; row < last; row += STRIP) {
    const count = Math.min(STRIP, last - row);
    const strip = readStrip(bitmap, row, count, channels);
    const target = columns.subarray((row - first) * width * channels);
    combine(strip, target, across, count, bitmap.width * channels, width * channels, channels, channels, channels);
  }
  const pixels = new Uint8ClampedArray(height * width * channels);
  const shifted = down.map(({ start, weights }) => ({ start: start - first, weights }));
  combine(columns, pixels, shifted, width * channels, 1, 1, width * channels, width * channels, 1);
  return pixels;
}

/** Returns Pillow's weights of the input pixels, for each output pixel from `offset`. Outside, there are none. */
function weigh(inSize, outSize, offset, count, resample) {
  const [radius, filter] = FILTERS[resample];
  const scale = inSize / outSize;
  const stretch = Math.max(1, scale);
  return Array.from({ length: count }, (_, idx) => {
    if (idx + offset < 0 || idx + offset >= outSize) return { start: 0, weights: [] };
    const center = (idx + offset + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - radius * stretch + 0.5));
    const end = Math.min(inSize, Math.trunc(center + radius * stretch + 0.5));
    const exact = Array.from({ length: end - start }, (_, k) => filter((k + start - center + 0.5) * (1 / stretch)));
    const sum = exact.reduce((total, each) => total + each, 0);
    const fixed = exact.map((each) => ((sum === 0 ? each : each / sum) * 2 ** PRECISION_BITS));
    return { start, weights: fixed.map((each) => Math.trunc(each < 0 ? each - 0.5 : each + 0.5)) };
  });
}

/** Sums weighted pixels along one axis of a picture, for `lines` lines.
 *
 * Of both pictures, a line starts `inLine` and `outLine` values after the one before, and a pixel `inStep` and
 * `outStep`. A pixel has `depth` values. */
function combine(input, output, plan, lines, inLine, outLine, inStep, outStep, depth) {
  for (let line = 0; line < lines; line++) {
    for (let idx = 0; idx < plan.length; idx++) {
      const { start, weights } = plan[idx];
      for (let channel = 0; channel < depth; channel++) {
        let sum = 2 ** (PRECISION_BITS - 1);
        let place = line * inLine + start * inStep + channel;
        for (let k = 0; k < weights.length; k++, place += inStep) sum += weights[k] * input[place];
        output[line * outLine + idx * outStep + channel] = sum >> PRECISION_BITS; // the array clips it to 8 bits
      }
    }
  }
}

/** Reads rows of a picture on a white background, in RGB or as Pillow's gray. */
function readStrip(bitmap, row, count, channels) {
  const canvas = new OffscreenCanvas(bitmap.width, count);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, count);
  context.drawImage(bitmap, 0, -row);
  const { data } = context.getImageData(0, 0, bitmap.width, count);
  const pixels = new Uint8ClampedArray((data.length / 4) * channels);
  for (let from = 0, to = 0; from < data.length; from += 4, to += channels) {
    const [red, green, blue] = [data[from], data[from + 1], data[from + 2]];
    if (channels === 1) pixels[to] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    else pixels.set([red, green, blue], to);
  }
  return pixels;
}

/** Rescales and normalizes pixels in float32, and puts the channels first. */
function normalize(pixels, { width, height }, channels, settings) {
  const factor = (settings.do_rescale ?? true) ? (settings.rescale_factor ?? 1 / 255) : 1;
  const isNormalized = settings.do_normalize ?? true;
  const values = new Float32Array(pixels.length);
  for (let channel = 0; channel < channels; channel++) {
    const mean = isNormalized ? pick(settings.image_mean, channel, channels) : 0;
    const std = isNormalized ? pick(settings.image_std, channel, channels) : 1;
    const table = Float32Array.from({ length: 256 }, (_, level) =>
      Math.fround(Math.fround(level * factor) - Math.fround(mean)) / Math.fround(std));
    const plane = values.subarray(channel * width * height);
    for (let idx = 0; idx < width * height; idx++) plane[idx] = table[pixels[idx * channels + channel]];
  }
  return values;
}

/** Returns the value of a channel. A network of one channel takes the mean of several values. */
function pick(values, channel, channels) {
  if (!Array.isArray(values)) return values;
  return channels === 1 ? values.reduce((sum, each) => sum + each, 0) / values.length : values[channel];
}

async function run(values, height, width) {
  const { ort, session, channels } = network;
  const input = new ort.Tensor("float32", values, [1, channels, height, width]);
  return session.run({ [session.inputNames[0]]: input });
}

/** Classifies a picture. Returns logits, pixels, the map of the most likely class if the file carries maps, times. */
async function classify({ file }) {
  if (!network) throw new Sentence("The network is not loaded.");
  const { settings, channels } = network;
  const began = performance.now();
  const { pixels, values, width, height } = await preprocess(file, settings, channels);
  const prepared = performance.now();
  const outputs = await run(values, height, width);
  const ended = performance.now();
  const logits = Float32Array.from(outputs.logits.data);
  if (!logits.every(Number.isFinite)) {
    throw new Sentence("The network's answer holds no numbers, because its weights are too coarse: choose float32.");
  }
  const top = logits.indexOf(Math.max(...logits));
  return {
    logits, values, pixels, width, height, channels,
    map: findMap(outputs.activation_maps, top),
    times: { picture: prepared - began, network: ended - prepared },
  };
}

/** Returns what each cell of the last stage adds to the logit of a class, or null if the file does not tell. */
function findMap(maps, label) {
  if (!maps) return null;
  const [, , height, width] = maps.dims;
  return { height, width, values: maps.data.slice(label * height * width, (label + 1) * height * width) };
}

function brief(error) {
  return String(error?.message ?? error).replace(/\s+/g, " ").slice(0, 200);
}

const TASKS = { open, classify };

self.onmessage = async ({ data: { id, task, ...options } }) => {
  try {
    self.postMessage({ id, result: await TASKS[task](options) });
  } catch (error) {
    const text = error instanceof Sentence ? error.message : `The computation failed: ${brief(error)}`;
    self.postMessage({ id, error: text, isDecoding: error.name === "InvalidStateError" });
  }
};
