/* The page: takes a picture, lets the worker classify it, and shows the answer. No picture leaves the device. */

const MAX_PIXELS = 64e6; // of a picture: what cameras take; decoded, 256 MB
const TOP_K = 5;
const LINE_WIDTH = 26; // of a drawing, in its pixels
const MIN_SHOWN_SIDE = 224; // smaller inputs are enlarged under a map
const MAP_COLOR = [255, 122, 0];
const CONTROL_SECONDS = 3; // to wait for the service worker, which a forced reload leaves out
const STORE_SECONDS = 10; // to wait until all files are kept

const FORMATS = [ // by the first bytes, decoded as `readText` does
  [/^[^]PNG\r\n/, "PNG", true], [/^\xff\xd8\xff/, "JPEG", true], [/^GIF8/, "GIF", true],
  [/^RIFF[^]{4}WEBP/, "WebP", true], [/^BM/, "BMP", true],
  [/^[^]{4}ftypavi/, "AVIF", true], [/^[^]{4}ftyp(hei|hev|mif|msf)/, "HEIC"],
  [/^(II\*\0|MM\0\*)/, "TIFF"], [/^(\xff\x0a|\0\0\0\x0cJXL )/, "JPEG XL"],
  [/^(\0\0\0\x0cjP|\xff\x4f\xff\x51)/, "JPEG 2000"],
  [/^\s*(<\?xml[^]*)?<svg/, "SVG"], [/^%PDF/, "PDF"], [/^8BPS/, "Photoshop"],
];

const elements = Object.fromEntries([...document.querySelectorAll("[id]")].map((each) => [each.id, each]));
const { frame, picture, drawing, video } = elements;

class Sentence extends Error {} // for the visitor

/** The worker, and what it loaded. */
class Computer {
  constructor() {
    this.waiting = new Map();
    this.worker = new Worker("worker.js", { type: "module" });
    this.worker.onmessage = ({ data }) => (data.progress ? showProgress(data.progress) : this.settle(data));
    this.worker.onerror = () => {
      const error = "The worker of this page cannot be loaded: reload the page, or use a newer browser.";
      for (const id of this.waiting.keys()) this.settle({ id, error });
    };
  }

  ask(task, options) {
    const id = crypto.getRandomValues(new Uint32Array(1))[0];
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, task, ...options });
    });
  }

  settle({ id, result, error, isDecoding }) {
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    if (error) reject(Object.assign(new Sentence(error), { isDecoding }));
    else resolve(result);
  }
}

let about; // page.json, with the settings of the model and of the runtime
let computer; // of the model that the page shows
let ready; // the promise that all is loaded
let current = null; // the picture, as {file, name, notice}
let turn = 0; // counts pictures: an answer to an older one is dropped
let stream = null; // of the camera

async function start() {
  listen();
  ready = load();
  try {
    await ready;
    if (!current && about.examples.length) await classifyExample(about.examples[0]);
  } catch (error) {
    fail(error);
  }
}

async function load() {
  await takeControl();
  about = await loadSettings();
  describe();
  await open();
}

/** Starts the service worker. Reloads the page once if it can isolate it, which threads need. */
async function takeControl() {
  try {
    const worker = await navigator.serviceWorker.register("service-worker.js");
    const isControlled = () => navigator.serviceWorker.controller !== null;
    const isStarting = () => !isControlled() && (worker?.installing || worker?.waiting || worker?.active);
    for (let wait = 0; isStarting() && wait < CONTROL_SECONDS; wait += 0.05) await sleep(50);
    if (isControlled() && !crossOriginIsolated && window.top === window && !sessionStorage.reloaded) {
      sessionStorage.reloaded = true;
      location.reload();
      await new Promise(() => {});
    }
  } catch {
    // browsers without it, private windows, addresses without https: the line "Offline" tells
  }
}

async function loadSettings() {
  const names = ["page.json", "runtime.json", "config.json", "preprocessor_config.json"];
  const [page, runtime, config, processor] = await Promise.all(names.map(loadJson));
  const labels = Object.entries(config.id2label ?? {}).sort(([one], [other]) => one - other).map(([, label]) => label);
  return {
    ...page, labels, config, settings: processor, channels: config.num_channels ?? 3,
    runtime: { ...runtime, url: page.runtime ?? runtime.url },
  };
}

async function loadJson(name) {
  const response = await fetch(name).catch(() => {
    throw new Sentence(`${name} cannot be loaded: check the connection, and reload the page.`);
  });
  if (!response.ok) {
    throw new Sentence(`${name} is missing beside this page (${response.status}): publish the page again.`);
  }
  return response.json().catch(() => {
    throw new Sentence(`${name} is damaged: publish the page again.`);
  });
}

/** Fills in what does not depend on a picture. */
function describe() {
  const name = about.model ? document.createElement("a") : document.createElement("b");
  name.textContent = about.name;
  if (about.model) name.href = `https://huggingface.co/${about.model}`;
  elements.name.append(name, ".");
  for (const [dtype, { size }] of Object.entries(about.onnx)) {
    elements.weights.add(new Option(`${dtype}, ${megabytes(size)}`, dtype));
  }
  elements.device.options[1].disabled = !navigator.gpu;
  elements.device.options[1].label += navigator.gpu ? "" : ": not in this browser";
  for (const path of about.examples) {
    const button = document.createElement("button");
    const image = new Image();
    [image.src, image.alt] = [path, `Example: ${stem(path)}`];
    button.append(image);
    button.onclick = () => classifyExample(path);
    elements.examples.append(button);
  }
  elements.examples.hidden = !about.examples.length;
  elements.credits.hidden = !about.credits;
  elements.credits.firstElementChild.href = about.credits ?? "";
}

/** Loads the chosen model on the chosen device. If WebGPU fails, WebAssembly computes, and a sentence says so. */
async function open() {
  const { device, fallback, loading, runtime } = elements;
  loading.hidden = false;
  runtime.textContent = "Not loaded";
  fallback.textContent = "";
  try {
    const loaded = await openOn(device.value).catch((error) => {
      if (device.value !== "webgpu") throw error;
      device.value = "wasm";
      fallback.textContent = `WebGPU failed, so WebAssembly computes: ${error.message}`;
      return openOn("wasm");
    });
    showRuntime(loaded);
  } finally {
    loading.hidden = true;
  }
  checkOffline();
}

function openOn(device) {
  computer?.worker.terminate();
  computer = new Computer();
  const { path, size } = about.onnx[elements.weights.value];
  const { runtime, settings, channels } = about;
  return computer.ask("open", { model: path, size, device, runtime, settings, channels });
}

async function classifyExample(path) {
  const response = await fetch(path).catch(() => null);
  if (response?.ok) await classify(await response.blob(), stem(path));
  else fail(new Sentence(`${path} is missing beside this page: choose another picture.`));
}

function classifyFiles(files, advice) {
  const count = files?.length ?? 0;
  if (!count) fail(new Sentence(advice));
  else classify(files[0], files[0].name, count > 1 ? `The first of ${count} files is classified.` : "");
}

/** Classifies a file. Only the last of several calls shows its answer. */
async function classify(file, name, notice = "", isDrawing = false) {
  const own = ++turn;
  clearAnswer();
  current = { file, name, notice, isDrawing };
  if (!isDrawing) showPicture(file, name);
  elements.classes.ariaBusy = true;
  try {
    const sentences = [notice, await inspect(file, name)];
    await ready;
    const answer = await computer.ask("classify", { file });
    if (own !== turn) return;
    elements.notices.textContent = sentences.join(" ").trim();
    showAnswer(answer);
  } catch (error) {
    if (own !== turn) return;
    if (!isDrawing) showPicture(null);
    fail(error.isDecoding ? new Sentence(await describeFormat(file, name)) : error);
  } finally {
    if (own === turn) elements.classes.ariaBusy = false;
  }
}

/** Checks a file before it is decoded. Returns what the visitor should know of it. */
async function inspect(file, name) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  const isRead = await new Promise((resolve) => {
    image.onload = () => resolve(true);
    image.onerror = () => resolve(false);
  });
  URL.revokeObjectURL(image.src);
  if (!isRead) throw new Sentence(await describeFormat(file, name));
  const { naturalWidth: width, naturalHeight: height } = image;
  if (width * height > MAX_PIXELS) {
    throw new Sentence(
      `${name} has ${width} x ${height} pixels, at most ${MAX_PIXELS / 1e6} million are accepted: make it smaller.`,
    );
  }
  return (await isAnimated(file)) ? "The picture is animated: its first frame is classified." : "";
}

/** Returns why a browser does not decode a file. */
async function describeFormat(file, name) {
  if (!file.size) return `${name} is empty: choose another picture.`;
  const start = await readText(file.slice(0, 1000));
  const [, format, isCommon] = FORMATS.find(([pattern]) => pattern.test(start)) ?? [];
  if (!format) return `${name} is not a picture: choose a PNG, JPEG, WebP, GIF, BMP or AVIF file.`;
  if (isCommon) return `${name} is a damaged ${format} file, or this browser cannot decode it: save it again as PNG.`;
  return `${name} is a ${format} file, which this page cannot decode: save it as PNG or JPEG.`;
}

async function isAnimated(file) {
  const text = await readText(file);
  if (text.startsWith("GIF8")) return (text.match(/\x21\xf9\x04[^]{4}\0[\x2c\x21]/g) ?? []).length > 1;
  if (/^RIFF[^]{4}WEBP/.test(text)) return text.slice(12, 60).includes("ANIM");
  return FORMATS[0][0].test(text) && text.slice(0, text.indexOf("IDAT")).includes("acTL");
}

/** Returns the bytes of a file as characters. Bytes from 0x80 to 0x9f become other ones. */
async function readText(blob) {
  return new TextDecoder("windows-1252").decode(await blob.arrayBuffer());
}

function showAnswer({ logits, pixels, width, height, channels, map, times }) {
  const scores = toScores(logits);
  const order = [...scores.keys()].sort((one, other) => scores[other] - scores[one]).slice(0, TOP_K);
  const label = (idx) => about.labels[idx] ?? `class ${idx}`;
  const shortLabel = label(order[0]).split(",")[0]; // ImageNet's labels are lists of names
  elements.first.textContent = shortLabel;
  elements.bars.replaceChildren(...order.map((idx) => createBar(label(idx), scores[idx])));
  elements.timing.textContent =
    `${milliseconds(times.network)} for the network, ${milliseconds(times.picture)} to prepare the picture, ` +
    `${width} x ${height} pixels.`;
  elements.spoken.textContent = order.slice(0, 2).map((idx) => `${label(idx)}: ${percent(scores[idx])}`).join(". ");
  drawPixels(elements.seen, pixels, width, height, channels);
  elements["map-figure"].hidden = !map;
  if (map) drawMap(map, shortLabel);
}

/** Returns probabilities, as transformers' pipeline: softmax, or one sigmoid a label. */
function toScores(logits) {
  if (about.config.problem_type === "multi_label_classification" || logits.length === 1) {
    return Array.from(logits, (each) => 1 / (1 + Math.exp(-each)));
  }
  const exponentials = Array.from(logits, (each) => Math.exp(each - Math.max(...logits)));
  const sum = exponentials.reduce((total, each) => total + each, 0);
  return exponentials.map((each) => each / sum);
}

function createBar(label, score) {
  const [item, bar, name, value] = ["li", "span", "span", "span"].map((each) => document.createElement(each));
  bar.className = "bar";
  bar.style.width = `${100 * score}%`;
  [name.textContent, value.textContent, value.className] = [label, percent(score), "percent"];
  item.append(bar, name, value);
  return item;
}

function drawPixels(canvas, pixels, width, height, channels) {
  const image = new ImageData(width, height);
  for (let idx = 0; idx < width * height; idx++) {
    const at = (channel) => pixels[idx * channels + Math.min(channel, channels - 1)];
    image.data.set([at(0), at(1), at(2), 255], 4 * idx);
  }
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.style.imageRendering = width < MIN_SHOWN_SIDE / 2 ? "pixelated" : "auto";
}

/** Draws the cells that raise a class's logit over the network's input. */
function drawMap({ width, height, values }, label) {
  const largest = Math.max(...values);
  const cells = new ImageData(width, height);
  values.forEach((value, idx) => {
    cells.data.set([...MAP_COLOR, largest > 0 ? Math.max(0, 210 * (value / largest)) : 0], 4 * idx);
  });
  const small = Object.assign(document.createElement("canvas"), { width, height });
  small.getContext("2d").putImageData(cells, 0, 0);
  const { seen, map } = elements;
  const scale = Math.ceil(MIN_SHOWN_SIDE / seen.width);
  [map.width, map.height] = [scale * seen.width, scale * seen.height];
  const context = map.getContext("2d");
  context.imageSmoothingEnabled = scale === 1;
  context.globalAlpha = 0.55;
  context.drawImage(seen, 0, 0, map.width, map.height);
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, map.width, map.height);
  const place = values.indexOf(largest);
  const third = (position, names) => names[Math.min(2, Math.floor(3 * position))];
  const row = third((Math.floor(place / width) + 0.5) / height, ["top", "middle", "bottom"]);
  const column = third(((place % width) + 0.5) / width, ["left", "center", "right"]);
  map.ariaLabel = `What raises the score of ${label}: most of all, the ${row} ${column}`;
  elements["map-figure"].lastElementChild.textContent = `What raises the score of “${label}”`;
}

function clearAnswer() {
  elements.error.hidden = true;
  elements["map-figure"].hidden = true;
  elements.bars.replaceChildren();
  for (const id of ["first", "timing", "spoken", "notices"]) elements[id].textContent = "";
  elements.seen.width = elements.seen.width; // clears it
}

function fail(error) {
  elements.error.textContent = error instanceof Sentence ? error.message : `This page failed: ${error.message}`;
  elements.error.hidden = false;
  elements.error.scrollIntoView({ block: "nearest" });
  elements.loading.hidden = true;
  elements.classes.ariaBusy = false;
}

function showProgress({ loaded, size }) {
  const [text, bar] = elements.loading.children;
  text.textContent = `Loading the model: ${megabytes(loaded)} of ${megabytes(size)}`;
  bar.value = loaded / size;
}

function showRuntime({ threads, version, isolated }) {
  const count = threads === 1 ? "1 thread" : `${threads} threads`;
  const reason = isolated ? "" : ", because the browser does not isolate this page from others";
  const device = elements.device.value === "webgpu" ? "WebGPU, and WebAssembly for the scan" : "WebAssembly with SIMD";
  elements.runtime.textContent = `ONNX Runtime Web ${version}, ${device}, ${count}${reason}`;
}

/** Says whether all files are kept for visits without a network, and which. */
async function checkOffline() {
  const { path } = about.onnx[elements.weights.value];
  const device = elements.device.value;
  const parts = device === "webgpu" ? ["ort.webgpu.", ".asyncify.wasm"] : ["ort.wasm.", "-threaded.wasm"];
  const runtime = Object.keys(about.runtime.files).filter((name) => parts.some((part) => name.includes(part)));
  const files = [
    "./", "page.js", "worker.js", "page.json", "runtime.json", "config.json", "preprocessor_config.json",
    path, ...about.examples, ...runtime.map((name) => new URL(name, new URL(about.runtime.url, location.href)).href),
  ];
  let missing = files;
  for (let wait = 0; missing.length && wait < STORE_SECONDS && navigator.serviceWorker?.controller; wait += 0.5) {
    const found = await Promise.all(missing.map((file) => caches.match(file, { ignoreVary: true })));
    missing = missing.filter((_, idx) => !found[idx]);
    if (missing.length) await sleep(500);
  }
  elements.offline.textContent = missing.length
    ? "This visit needs the network: the browser keeps no files of this page yet."
    : `Works without a network. Kept: the page, its examples, ${path}, ONNX Runtime Web ${about.runtime.version}.`;
}

function listen() {
  const { file, choose, camera, draw, take, clear, weights, device } = elements;
  choose.onclick = () => file.click();
  file.onchange = () => {
    if (file.files.length) classifyFiles(file.files);
    file.value = ""; // so that the same file can be chosen again
  };
  camera.onclick = () => (stream ? showPicture(current?.file, current?.name) : openCamera());
  draw.onclick = () => (drawing.hidden ? openDrawing() : showPicture(current?.file, current?.name));
  take.onclick = () => {
    const size = { width: video.videoWidth, height: video.videoHeight };
    const canvas = Object.assign(document.createElement("canvas"), size);
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => classify(blob, "The picture of the camera"));
  };
  video.onloadeddata = () => {
    take.disabled = false;
    take.focus();
  };
  clear.onclick = openDrawing;
  weights.onchange = device.onchange = () => {
    clearAnswer();
    const again = current;
    ready = open();
    ready.then(() => again && again === current && classify(...Object.values(again)), fail);
  };
  addEventListener("paste", ({ clipboardData }) => {
    classifyFiles(clipboardData.files, "The clipboard holds no picture: copy a picture first.");
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("dragenter", () => frame.classList.add("over"));
  addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || frame.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    frame.classList.remove("over");
    classifyFiles(event.dataTransfer.files, "What was dropped is no file: save the picture, and drop its file.");
  });
  listenToPen();
}

function listenToPen() {
  const context = drawing.getContext("2d");
  const place = (event) => [event.offsetX, event.offsetY].map((each) => (each * drawing.width) / drawing.clientWidth);
  drawing.onpointerdown = (event) => {
    drawing.setPointerCapture(event.pointerId);
    Object.assign(context, { lineWidth: LINE_WIDTH, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...place(event));
    drawing.onpointermove(event);
  };
  drawing.onpointermove = (event) => {
    if (!drawing.hasPointerCapture(event.pointerId)) return;
    context.lineTo(...place(event));
    context.stroke();
  };
  drawing.onlostpointercapture = () => drawing.toBlob((blob) => classify(blob, "The drawing", "", true));
}

/** Shows one of the picture, the drawing, the camera, or, for null, a hint. */
function show(element) {
  for (const each of frame.children) each.hidden = each !== element;
  elements.clear.hidden = element !== drawing;
  elements.take.hidden = element !== video;
  elements.draw.ariaPressed = element === drawing;
  elements.camera.ariaPressed = element === video;
  if (element !== video) {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
  }
}

function showPicture(file, name) {
  URL.revokeObjectURL(picture.src);
  if (!file) return show(elements.empty);
  [picture.src, picture.alt] = [URL.createObjectURL(file), name];
  show(picture);
}

function openDrawing() {
  const context = drawing.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, drawing.width, drawing.height);
  turn++;
  current = null;
  clearAnswer();
  show(drawing);
}

async function openCamera() {
  const { camera, take } = elements;
  camera.disabled = true; // a second click would open a second stream
  take.disabled = true; // before its first frame, a video has no pixels
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    video.srcObject = stream;
    show(video);
  } catch (error) {
    show(elements.empty);
    const reasons = {
      NotAllowedError: "The camera is blocked: allow it for this page in the browser.",
      NotFoundError: "This device has no camera: choose a picture.",
      TypeError: "Browsers give the camera to pages with https only: choose a picture.",
    };
    fail(new Sentence(reasons[error.name] ?? `The camera does not start: choose a picture. (${error.message})`));
  } finally {
    camera.disabled = false;
  }
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const stem = (path) => path.split("/").at(-1).replace(/\.\w+$/, "").replaceAll("_", " ");
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const milliseconds = (time) => `${time.toFixed(time < 10 ? 1 : 0)} ms`;
const percent = (score) => `${(100 * score).toFixed(1)} %`;

start();
