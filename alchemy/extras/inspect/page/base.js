// Shared: elements, numbers, images cut from sprite sheets, the heat map, the step shown.

const data = JSON.parse(document.getElementById("data").textContent);

// element("p.note", {onclick: f}, "text", child, ...). "html" sets markup: for our own text only,
// never for a prompt.
function element(selector, attributes, ...children) {
  const [tag, ...classes] = selector.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "html") node.innerHTML = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child != null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function number(x, digits = 3) {
  if (x == null) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5)) {
    return x.toExponential(1).replace("e", " · 10^").replace("^+", "^");
  }
  return String(+x.toPrecision(digits));
}

function percent(x) {
  if (x >= 0.1) return (100 * x).toFixed(0) + " %";
  return (x >= 0.001 ? (100 * x).toFixed(1) : (100 * x).toPrecision(1)) + " %";
}

// The index of the entry of `steps` that is nearest to k.
function nearest(steps, k) {
  const closer = (best, step, i) => Math.abs(step - k) < Math.abs(steps[best] - k) ? i : best;
  return steps.reduce(closer, 0);
}

// Images are decoded once, when first needed.
const images = new Map();
function loadImage(src) {
  if (!images.has(src)) {
    images.set(src, new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("an image of this page is damaged"));
      image.src = src;
    }));
  }
  return images.get(src);
}

// A rectangle of an image as ImageData.
async function pixels(src, x, y, w, h) {
  const image = await loadImage(src), canvas = document.createElement("canvas");
  canvas.width = w, canvas.height = h;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(image, x, y, w, h, 0, 0, w, h);
  return context.getImageData(0, 0, w, h);
}

// Frame k of a sprite sheet as ImageData.
function frame({src, columns, w, h}, k) {
  return pixels(src, k % columns * w, Math.floor(k / columns) * h, w, h);
}

// Show ImageData on a canvas, unless a later call has overtaken this one.
async function show(canvas, promise) {
  const call = canvas.call = (canvas.call || 0) + 1;
  const image = await promise;
  if (canvas.call !== call) return;
  canvas.width = image.width, canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Black, violet, orange, pale yellow: ever lighter, so that it reads without colour too.
const STOPS = [[12, 8, 26], [74, 22, 110], [170, 46, 98], [238, 108, 58], [252, 190, 82],
  [255, 250, 208]];
const COLORS = Array.from({length: 256}, (_, i) => {
  const x = i / 255 * (STOPS.length - 1), k = Math.min(Math.floor(x), STOPS.length - 2);
  return STOPS[k].map((low, c) => Math.round(low + (x - k) * (STOPS[k + 1][c] - low)));
});

// A grey map in colours, over a grey copy of an image if one is given.
function colorize(map, under) {
  const {width, height} = under || map, out = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const y = Math.floor(Math.floor(i / width) * map.height / height);
    const x = Math.floor(i % width * map.width / width);
    const value = map.data[4 * (y * map.width + x)];
    const share = under ? 0.3 + 0.6 * value / 255 : 1;
    const sum = under ? under.data[4 * i] + under.data[4 * i + 1] + under.data[4 * i + 2] : 0;
    for (let c = 0; c < 3; c++) {
      out.data[4 * i + c] = share * COLORS[value][c] + (1 - share) * 0.2 * sum;
    }
    out.data[4 * i + 3] = 255;
  }
  return out;
}

// Frame k of a map in colours; over frame j of `under`, if given.
async function heat(sprites, k, under, j) {
  return colorize(await frame(sprites, k), under && await frame(under, j));
}

// An image with its caption: [figure, canvas, caption].
function tile(caption, name) {
  const label = caption.replace(/<[^>]*>/g, "");
  const canvas = element("canvas", {role: "img", "data-shows": name, "aria-label": label});
  canvas.width = canvas.height = 1;
  const words = element("figcaption", {html: caption});
  return [element("figure", {}, canvas, words), canvas, words];
}

function card(classes, title, html, ...children) {
  return element("section.card" + classes, {}, element("h3", {}, title), element("p", {html}),
    ...children);
}

const notShown = (title, reason) => card(".full", title, "Not shown: " + reason);

function definitions(rows) {
  return element("dl.numbers", {}, ...rows.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// Axes with x in [x0, x1], y in [y0, y1], with a line at each tick [y, label].
// move(v) sets the dashed rule that marks the step shown.
function chart([x0, x1], [y0, y1], ticks, {W, H, left, right}) {
  const margin = 46, x = v => margin + (v - x0) / (x1 - x0 || 1) * (W - margin - 12);
  const y = v => 8 + (y1 - Math.max(Math.min(v, y1), y0)) / (y1 - y0 || 1) * (H - 30);
  const text = (x, y, anchor, label) => svg("text", {x, y, "text-anchor": anchor}, label);
  const grid = ticks.flatMap(([v, label]) => [
    svg("line", {x1: margin, x2: W - 12, y1: y(v), y2: y(v), class: "tick"}),
    text(margin - 6, y(v) + 3.5, "end", label)]);
  const rule = svg("line", {y1: 4, y2: H - 22, class: "rule"});
  const drawing = svg("svg", {viewBox: `0 0 ${W} ${H}`, class: "plot"}, ...grid, rule,
    text(margin, H - 6, "start", left), text(W - 12, H - 6, "end", right));
  const line = (points, classes) => drawing.append(svg("polyline", {class: classes,
    points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ")}));
  const dot = (a, b, r, classes) => {
    const node = svg("circle", {cx: x(a), cy: y(b), r, class: classes});
    drawing.append(node);
    return node;
  };
  const move = v => ["x1", "x2"].forEach(name => rule.setAttribute(name, x(v)));
  return {drawing, x, y, line, dot, move};
}

// The step that the bar at the top selects. `onStep(f)` calls f(k) whenever it changes.
const timeline = {k: 0, listeners: [], frames: []};
const onStep = listener => timeline.listeners.push(listener);
function go(k) {
  timeline.k = Math.max(0, Math.min(timeline.frames.length - 1, k));
  for (const listener of timeline.listeners) listener(timeline.k);
}
