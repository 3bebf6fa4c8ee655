// What all parts use: elements, films (all frames of a quantity in one picture), colours, numbers, the place in time.

const data = JSON.parse(document.getElementById("data").textContent);

// element("p.note", {onclick: f}, "text", child, ...); "html" among the attributes is for text of ours, never for the data's.
function element(what, attributes, ...children) {
  const [tag, ...classes] = what.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "html") made.innerHTML = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter(child => child != null));
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Numbers as people read them: 0.0123, 12.3, 1 230.
function number(x, digits = 3) {
  if (x == null) return "–";
  if (!isFinite(x)) return "∞";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5)) return x.toExponential(1).replace("e", " · 10^").replace("^+", "^");
  return String(+x.toPrecision(digits));
}
const percent = x => x >= 0.1 ? (100 * x).toFixed(0) + " %" : x >= 0.001 ? (100 * x).toFixed(1) + " %" : (100 * x).toPrecision(1) + " %";

// Pictures are decoded once, when first needed.
const loaded = new Map();
function picture(src) {
  if (!loaded.has(src)) {
    loaded.set(src, new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("a picture of this page is damaged"));
      image.src = src;
    }));
  }
  return loaded.get(src);
}

function surface(w, h) {
  const canvas = document.createElement("canvas");
  canvas.width = w;
  canvas.height = h;
  return canvas.getContext("2d", {willReadFrequently: true});
}

// One frame of a film as ImageData.
async function frame(film, k) {
  const image = await picture(film.src), context = surface(film.w, film.h);
  context.drawImage(image, k % film.columns * film.w, Math.floor(k / film.columns) * film.h, film.w, film.h, 0, 0, film.w, film.h);
  return context.getImageData(0, 0, film.w, film.h);
}

// Put pixels on a canvas, unless something newer was asked of it meanwhile.
async function show(canvas, pixels) {
  const turn = canvas.turn = (canvas.turn || 0) + 1;
  const made = await pixels;
  if (canvas.turn !== turn) return;
  canvas.width = made.width;
  canvas.height = made.height;
  canvas.getContext("2d").putImageData(made, 0, 0);
}

// Black, violet, orange, pale yellow: each lighter than the one before, so that it reads without colour too.
const HEAT = [[12, 8, 26], [74, 22, 110], [170, 46, 98], [238, 108, 58], [252, 190, 82], [255, 250, 208]];
const COLOURS = Array.from({length: 256}, (_, i) => {
  const x = i / 255 * (HEAT.length - 1), k = Math.min(Math.floor(x), HEAT.length - 2);
  return HEAT[k].map((low, c) => Math.round(low + (x - k) * (HEAT[k + 1][c] - low)));
});

// A grey map in colours; over a picture, where one is given: the lighter the map, the less of the grey picture shows through.
function coloured(map, under) {
  const w = under ? under.width : map.width, h = under ? under.height : map.height;
  const made = new ImageData(w, h);
  for (let y = 0, i = 0; y < h; y++) {
    const row = Math.floor(y * map.height / h) * map.width;
    for (let x = 0; x < w; x++, i += 4) {
      const value = map.data[4 * (row + Math.floor(x * map.width / w))];
      const colour = COLOURS[value], share = under ? 0.3 + 0.6 * value / 255 : 1;
      const grey = under ? (under.data[i] + under.data[i + 1] + under.data[i + 2]) / 3 * 0.6 : 0;
      for (let c = 0; c < 3; c++) made.data[i + c] = share * colour[c] + (1 - share) * grey;
      made.data[i + 3] = 255;
    }
  }
  return made;
}

// Of steps in order, where the one nearest to k stands.
const nearest = (at, k) => at.reduce((best, j, i) => Math.abs(j - k) < Math.abs(at[best] - k) ? i : best, 0);

const heat = async (map, k, under, j) => coloured(await frame(map, k), under && await frame(under, j));

// A picture with its caption; returns [figure, canvas, caption].
function tile(caption, name) {
  const canvas = element("canvas", {role: "img", "data-shows": name, "aria-label": caption.replace(/<[^>]*>/g, "")});
  canvas.width = canvas.height = 1;
  const words = element("figcaption", {html: caption});
  return [element("figure", {}, canvas, words), canvas, words];
}

function card(kind, title, text, ...children) {
  return element("section.card" + kind, {}, element("h3", {}, title), element("p", {html: text}), ...children);
}

// What a page could show, and does not.
const absent = (title, why) => card(".full", title, "Not shown: " + why);

// Names and values in columns.
function numbers(rows) {
  return element("dl.numbers", {}, ...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// The place in time that the bar at the top sets; whoever shows something of it listens.
const time = {k: 0, listeners: [], frames: []};
function follow(listener) {
  time.listeners.push(listener);
}
function go(k) {
  time.k = Math.max(0, Math.min(time.frames.length - 1, k));
  for (const listener of time.listeners) listener(time.k);
}
