"use strict";
const byId = (id) => document.getElementById(id);
const loads = new Map();
const views = { wall: byId("wall"), map: byId("map") };
let current = -1;

/* Names come from files and models: they are only ever set as text. */
function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function drawing(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/* A long name breaks behind a dot or an underscore. */
const breakable = (name) => name.split(/(?<=[._])/).flatMap((part) => [part, element("wbr")]);

const address = (layer, map) =>
  "#" + encodeURIComponent(settings.layers[layer].name) + (map === undefined ? "" : "/" + map);

/* A script, not a request: pages opened from a file may not fetch. */
const explorer = {
  data: [],
  loaded(data) { explorer.data[explorer.loading] = data; },
};
function load(layer) {
  if (!loads.has(layer)) {
    const before = [...loads.values()].at(-1) ?? Promise.resolve();
    loads.set(layer, before.catch(() => {}).then(() => new Promise((resolve, reject) => {
      explorer.loading = layer;
      const script = element("script", { src: `layers/${layer}/data.js` });
      script.onload = () => resolve(explorer.data[layer]);
      script.onerror = () => reject(new Error(`layers/${layer}/data.js is missing`));
      document.head.append(script);
    })));
  }
  return loads.get(layer);
}

/* One cell of a sprite sheet of columns x rows cells, as a background. */
function sprite(url, column, row, columns, rows, blend = false) {
  const percent = (i, n) => (n > 1 ? (100 * i) / (n - 1) : 0);
  const node = element("span", { className: blend ? "layer blend" : "layer" });
  node.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
  node.style.backgroundPosition = `${percent(column, columns)}% ${percent(row, rows)}%`;
  node.dataset.url = url;
  return node;
}
function show(node) {
  for (const layer of node.querySelectorAll("[data-url]")) {
    layer.style.backgroundImage = `url("${layer.dataset.url}")`;
  }
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      show(entry.target);
      seen.unobserve(entry.target);
    }
  }
}, { rootMargin: "600px" });

function picture(...layers) {
  const node = element("span", { className: "picture" }, ...layers);
  node.setAttribute("aria-hidden", "true");
  return node;
}

/* ── the wall ─────────────────────────────────────────────────────────────────────────────────────────── */

const orders = {
  number: () => (a, b) => a - b,
  strength: (data) => (a, b) => (data.values[b][0] ?? 0) - (data.values[a][0] ?? 0) || a - b,
  selective: (data) => (a, b) => (data.active[a] || 2) - (data.active[b] || 2) || a - b,
  common: (data) => (a, b) => data.active[b] - data.active[a] || a - b,
  dead: (data) => (a, b) => (data.active[a] > 0) - (data.active[b] > 0) || a - b,
};

function tile(layer, data, map) {
  const side = settings.wall, place = map % side ** 2;
  const sheet = `layers/${layer}/wall-${Math.floor(map / side ** 2)}`;
  const kind = document.querySelector("[name=show]:checked").value;
  const cell = (k, blend) => sprite(`${sheet}-${k}.jpg`, place % side, Math.floor(place / side), side, side, blend);
  const layers = kind === "o" ? [cell("i"), cell("p", true)] : [cell(kind)];
  const share = `${(100 * data.active[map]).toFixed(data.active[map] < 0.1 ? 1 : 0)}%`;
  const link = element("a", { href: address(layer, map) }, picture(...layers),
    element("span", { className: "caption" }, element("span", { textContent: map }), element("span", { textContent: share })));
  link.setAttribute("aria-label", `Map ${map}, ${data.active[map] ? `fires in ${share} of the images` : "dead"}`);
  const item = element("li", { className: data.active[map] ? "" : "dead" }, link);
  seen.observe(item);
  return item;
}

function drawWall(layer, data) {
  const about = settings.layers[layer], search = byId("search").value.trim();
  byId("wall-name").textContent = about.name;
  byId("wall-facts").textContent = `${counted(about.maps, "map")} of ${about.space.join(" × ") || "one cell"}; ` +
    `a unit sees ${about.field}; ${counted(about.seen, "image")}, ${counted(about.dead, "dead map")}. Below a tile: ` +
    "its number, and the share of images that activate it.";
  const maps = [...Array(about.maps).keys()].filter((map) => String(map).startsWith(search));
  maps.sort(orders[byId("sort").value](data));
  seen.disconnect();
  byId("tiles").replaceChildren(...maps.map((map) => tile(layer, data, map)));
  byId("status").textContent = `${counted(maps.length, "map")} of ${about.name}`;
}

/* ── one map ──────────────────────────────────────────────────────────────────────────────────────────── */

function unit(layer, data, map, rank) {
  const about = settings.layers[layer], [height, width] = about.image;
  const columns = Math.ceil(Math.sqrt(about.k)), rows = Math.ceil(about.k / columns);
  const cell = (block) => picture(sprite(`layers/${layer}/map-${map}.jpg`, block * columns + (rank % columns),
    Math.floor(rank / columns), settings.blocks * columns, rows));
  const [y0, y1, x0, x1] = data.boxes[map][rank], number = data.images[map][rank];
  const name = data.names[number] ?? `image ${number}`;
  const box = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  const photograph = element("div", { className: "photograph" },
    element("img", { src: `images/${number}.jpg`, alt: name, loading: "lazy" }),
    drawing("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      drawing("rect", { class: "under", ...box }), drawing("rect", box)));
  const item = element("li", {}, element("div", { className: "pair" }, photograph, cell(0), cell(1)),
    element("p", { className: "name" }, element("b", { textContent: data.values[map][rank] }), ` ${name}`));
  show(item);
  return item;
}

function mosaic(layer, map, title, ...blocks) {
  const layers = blocks.map((block, i) => sprite(`layers/${layer}/map-${map}.jpg`, block, 0, settings.blocks, 1, i > 0));
  const node = element("figure", {}, picture(...layers), element("figcaption", { textContent: title }));
  show(node);
  return node;
}

function histogram(counts) {
  const width = 700, height = 140, step = width / counts.length, top = Math.max(...counts, 1);
  const bars = counts.map((count, i) => drawing("rect", { x: i * step + 1, width: step - 2,
    y: height - 20 - (count / top) * (height - 40), height: (count / top) * (height - 40) },
    drawing("title", {}, counted(count, "image"))));
  const ticks = settings.edges.map((edge, i) => [edge, i]).filter(([, i]) => i % 8 === 4).map(([edge, i]) =>
    drawing("text", { x: (i + 1) * step, y: height - 4, "text-anchor": "middle" }, String(Number(edge.toPrecision(4)))));
  const label = drawing("text", { x: 0, y: 12 }, `images by their strongest activation of the map (most in a bar: ${top})`);
  return drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label.textContent }, label, ...bars, ...ticks);
}

function link(node, layer, map, text) {
  const there = map >= 0 && map < settings.layers[layer].maps;
  node.hidden = !there;
  if (there) {
    node.href = address(layer, map);
    node.textContent = text;
  }
}

function drawMap(layer, data, map) {
  const about = settings.layers[layer], [first] = data.values[map];
  byId("back").href = address(layer);
  byId("map-name").textContent = `${about.name}, map ${map}`;
  byId("map-facts").textContent = data.active[map]
    ? `Fires in ${(100 * data.active[map]).toFixed(1)}% of ${counted(about.seen, "image")}, at most ${first}, on average ` +
      `${data.mean[map]}. A unit sees ${about.field}.`
    : `Dead: none of ${counted(about.seen, "image")} activates it, so what follows shows nothing.`;
  link(byId("previous"), layer, map - 1, `← map ${map - 1}`);
  link(byId("next"), layer, map + 1, `map ${map + 1} →`);
  byId("mosaics").replaceChildren(
    mosaic(layer, map, "projections, the strongest first", 0),
    mosaic(layer, map, "patches of the images", 1),
    mosaic(layer, map, "overlay", 1, 0),
    ...(settings.blocks > 2 ? [mosaic(layer, map, "control: the same units with shuffled weights", 2)] : []));
  byId("units").replaceChildren(...data.images[map].map((_, rank) => unit(layer, data, map, rank)));
  byId("histogram").replaceChildren(histogram(data.histogram[map]));
  byId("status").textContent = byId("map-name").textContent;
}

/* ── where we are: #layer or #layer/map ───────────────────────────────────────────────────────────────── */

function place() {
  const hash = location.hash.slice(1), slash = hash.lastIndexOf("/");
  let name = slash < 0 ? hash : hash.slice(0, slash);
  try { name = decodeURIComponent(name); } catch { name = ""; }
  const found = settings.layers.findIndex((about) => about.name === name), layer = Math.max(found, 0);
  const map = slash < 0 || found < 0 ? NaN : Number(hash.slice(slash + 1));
  return { layer, map: Number.isInteger(map) && map >= 0 && map < settings.layers[layer].maps ? map : null };
}

let scrolled = 0;
async function draw() {
  if (location.hash === "#main") return;
  const { layer, map } = place();
  if (!views.wall.hidden && map !== null) scrolled = scrollY;
  let data;
  try { data = await load(layer); } catch (error) {
    byId("status").className = "";
    byId("status").textContent = error.message;
    return;
  }
  const now = place();
  if (now.layer !== layer || now.map !== map) return;
  byId("layers").querySelectorAll("a").forEach((a, i) => {
    if (i === layer) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  });
  const fresh = current !== layer;
  views.wall.hidden = map !== null;
  views.map.hidden = map === null;
  document.title = settings.layers[layer].name + (map === null ? "" : `, map ${map}`);
  if (map !== null) drawMap(layer, data, map);
  else if (fresh) drawWall(layer, data);
  if (map === null) current = layer;
  scrollTo(0, map === null && !fresh ? scrolled : 0);
}

function redraw() {
  current = -1;
  draw();
}

byId("layers").append(...settings.layers.map((about, layer) => element("li", {},
  element("a", { href: address(layer) }, ...breakable(about.name), element("small", {
    textContent: `${counted(about.maps, "map")} of ${about.space.join(" × ") || "one cell"}; sees ${about.field}` })))));
byId("tools").addEventListener("submit", (event) => {
  event.preventDefault();
  const map = byId("search").value.trim(), { layer } = place();
  if (/^\d+$/.test(map) && Number(map) < settings.layers[layer].maps) location.hash = address(layer, Number(map));
});
byId("search").addEventListener("input", redraw);
byId("sort").addEventListener("change", redraw);
byId("show").addEventListener("change", redraw);
addEventListener("hashchange", draw);
addEventListener("keydown", (event) => {
  const { layer, map } = place();
  if (event.target.matches("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "/") {
    event.preventDefault();
    if (map !== null) location.hash = address(layer);
    setTimeout(() => byId("search").focus(), map === null ? 0 : 100);
  } else if (map !== null && event.key === "Escape") location.hash = address(layer);
  else if (map !== null && step && map + step >= 0 && map + step < settings.layers[layer].maps) {
    location.hash = address(layer, map + step);
  }
});
draw();
