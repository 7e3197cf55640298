/* Lets the page work offline, and with threads.

Every file comes from the network and is kept. If the network fails, the kept one answers. Threads need shared memory,
which browsers give to pages with the headers below. Servers that do not send them leave that to this file. */

const CACHE = `efficientvmamba ${self.registration.scope}`;
const PAGE = [
  "./", "page.js", "worker.js", "page.json", "runtime.json", "config.json", "preprocessor_config.json",
]; // loaded before this file controls the page
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "cross-origin",
};

self.addEventListener("install", (event) => event.waitUntil(install()));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith("http")) event.respondWith(answer(event));
});

async function install() {
  const cache = await caches.open(CACHE);
  await cache.addAll(PAGE);
  await self.skipWaiting();
}

async function answer(event) {
  const cache = await caches.open(CACHE);
  let response;
  try {
    response = await fetch(event.request);
  } catch (error) {
    response = await cache.match(event.request, { ignoreSearch: event.request.mode === "navigate", ignoreVary: true });
    if (!response) throw error;
    return isolate(response);
  }
  if (response.status === 200) {
    event.waitUntil(cache.put(event.request, response.clone()).catch(() => null)); // a full disk keeps nothing
  }
  return isolate(response);
}

function isolate(response) {
  if (response.status === 0) return response; // of another origin, which hides it
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
