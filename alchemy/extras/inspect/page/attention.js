// Attention: from a word to places (cross-attention), from a place to places (self-attention).

const ENCODERS = ["tokenizer (CLIP ViT-L)", "tokenizer_2 (OpenCLIP ViT-bigG)"];
const best = stage => stage.cross.all || Object.values(stage.cross)[0];

// A button for each token of one tokenizer; those of the first have their mean map and their mean share of the attention.
function chips(stage, {pieces}, first, pick) {
  return element("div.chips", {}, ...pieces.map(([id, text], i) => {
    const button = element("button.chip", {type: "button", "data-token": i, title: `position ${i}, id ${id}`, onclick: () => pick(i)});
    if (first) {
      const film = best(stage).films[i], canvas = element("canvas", {width: 1, height: 1});
      show(canvas, heat(film, film.n - 1));
      button.append(canvas);
    }
    const share = stage.mass.reduce((sum, row) => sum + row[i], 0) / stage.mass.length;
    // One character may be several tokens: what is but some of its bytes has no spelling.
    button.append(element("b", {}, text.includes("\uFFFD") ? "part of a character" : text),
      element("small", {}, first ? `${id} · ${percent(share)}` : `${id}`));
    return button;
  }));
}

// Up to `most` of the indices 0 ... count - 1, evenly, with the first and the last.
function spread(count, most) {
  const n = Math.min(count, most);
  return Array.from({length: n}, (_, i) => Math.round(i * (count - 1) / Math.max(n - 1, 1)));
}

function words(stage) {
  const levels = Object.keys(stage.cross), cut = stage.tokens[0].pieces, shown = stage.cross[levels[0]].at;
  const chosen = spread(shown.length, 10).map(i => shown[i]);  // of a long prompt, some steps have maps
  const now = levels.map(level => tile("", `cross ${level}`)), mean = levels.map(level => tile("", `mean ${level}`));
  const strip = element("div.strip"), said = element("p.said");
  // First the word that the page is about, or else the one with the clearest place.
  const peak = i => stage.cross[levels[0]].range[i][1];
  let token = stage.focus || cut.map((_, i) => i).slice(1, -1).reduce((found, i) => peak(i) > peak(found) ? i : found, 1), at = 0;

  function update() {
    const near = nearest(shown, at), which = shown[near] === at ? "this step" : `step ${stage.steps[shown[near]].index + 1}`;
    for (const [i, level] of levels.entries()) {
      const film = stage.cross[level].films[token], [low, high] = stage.cross[level].range[token], all = level === "all";
      show(now[i][1], heat(film, near, stage.films.x_0, shown[near]));
      show(mean[i][1], heat(film, film.n - 1, stage.films.x_0, stage.steps.length - 1));
      const scale = all ? `${number(low, 2)} to ${number(high, 2)} times the mean` : `${percent(low)} to ${percent(high)}`;
      now[i][2].textContent = `${all ? "all levels" : `level ${level}`}, ${which}`;
      mean[i][2].textContent = `mean over the steps; dark to light: ${scale}`;
    }
    const share = stage.mass[at], sum = share.reduce((sum, x) => sum + x, 0);
    said.textContent = `“${cut[token][1]}” gets ${percent(share[token])} of all attention at this step` +
      (cut.length < 77 ? `, all ${cut.length} tokens together ${percent(sum)}, the padding behind them the rest.` :
        "; the prompt fills all 77.");
    for (const button of made.querySelectorAll(".chip")) button.setAttribute("aria-pressed", button.dataset.token == token);
    for (const [i, k] of chosen.entries()) strip.children[i].classList.toggle("now", k === shown[near]);
  }

  function pick(i) {
    token = i;
    strip.replaceChildren(...chosen.map(k => {
      const [figure, canvas] = tile(`t ${number(stage.steps[k].t, 3)}`, `strip ${k}`);
      show(canvas, heat(best(stage).films[token], shown.indexOf(k)));
      const there = () => go(time.frames.findIndex(step => step.t <= stage.steps[k].t + 1e-6));
      return element("button", {type: "button", "aria-label": `go to step ${stage.steps[k].index + 1}`, onclick: there}, figure);
    }));
    update();
  }

  const row = tiles => element("div.row", {}, ...tiles.map(([figure]) => figure));
  const lost = stage.tokens[0].lost;
  const made = card(".full", "Which places look at which word",
    `In cross-attention each place of the picture spreads one unit of attention over the 77 tokens of the prompt. Pick a token: light
     places look at it. The start, the end and any padding say little; what goes there is how a place looks away.
     <b class="formula">softmax(<i>q k</i>ᵀ/√<i>d</i>), <i>q</i> from places, <i>k</i> from tokens</b>
     Here: the mean over the heads and layers of a level${stage.guided ? ", of the half of the batch that is told the prompt" : ""}.`,
    ...stage.tokens.flatMap((tokens, n) => [element("div.label", {}, ENCODERS[n]), chips(stage, tokens, n === 0, pick)]),
    lost ? element("p.wait", {}, `Too long: these words are lost: ${lost}`) : null,
    said, element("div.pair", {}, row(now), row(mean)), element("div.label", {}, "through the steps (click to go there)"), strip);
  pick(token);
  return [made, k => { at = k; update(); }];
}

function places(stage) {
  const levels = Object.keys(stage.own), shown = element("div.row"), choice = element("div.chips");
  const [figure, canvas] = tile("click a place, or move it with the arrow keys", "place");
  canvas.className = "pick";
  canvas.tabIndex = 0;
  let level = levels.reduce((finest, l) => stage.own[l].w > stage.own[finest].w ? l : finest), place = [0.5, 0.5];

  // A row of the matrix of all places by all places is what one of them attends to.
  async function map(k, src, q, {w, h}) {
    const context = surface(w * h, 1);
    context.drawImage(await picture(src), 0, q, w * h, 1, 0, 0, w * h, 1);
    return coloured({width: w, height: h, data: context.getImageData(0, 0, w * h, 1).data}, await frame(stage.films.x_0, k));
  }

  async function update() {
    const own = stage.own[level], {w, h} = own, q = Math.floor(place[1] * h) * w + Math.floor(place[0] * w);
    shown.replaceChildren(...own.at.map((k, i) => {
      const [figure, canvas] = tile(`t ${number(stage.steps[k].t, 3)}`, `own ${k}`);
      show(canvas, map(k, own.src[i], q, own));
      return figure;
    }));
    choice.replaceChildren(...levels.map(l => element("button.chip",
      {type: "button", "aria-pressed": String(l === level), onclick: () => { level = l; update(); }}, element("b", {}, `level ${l}`))));

    const image = await picture(stage.picture), context = canvas.getContext("2d");
    canvas.width = image.width, canvas.height = image.height;
    context.drawImage(image, 0, 0);
    const cell = [image.width / w, image.height / h], corner = [q % w * cell[0], Math.floor(q / w) * cell[1]];
    for (const [colour, width] of [["#000", 3], ["#fff", 1.5]]) {
      context.lineWidth = width * Math.max(1, image.width / 256), context.strokeStyle = colour;
      context.strokeRect(...corner, ...cell);
    }
  }

  function pick(x, y) {
    place = [x, y].map(v => Math.max(0, Math.min(0.999, v)));
    update();
  }
  canvas.addEventListener("click", event => {
    const box = canvas.getBoundingClientRect();
    pick((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
  canvas.addEventListener("keydown", event => {
    const by = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!by) return;
    pick(place[0] + by[0] / stage.own[level].w, place[1] + by[1] / stage.own[level].h);
    event.preventDefault();
  });
  update();
  const made = card(".full", "Which places look at which places",
    `In self-attention the places look at each other: this is how the left ear knows where the right one is. Pick a place in the picture;
     light is what it attends to, each map by its own largest.
     <b class="formula">softmax(<i>q k</i>ᵀ/√<i>d</i>), <i>q</i> and <i>k</i> from places</b>`,
    levels.length > 1 ? choice : null, element("div.places", {}, figure, shown));
  return [made, () => {}];
}
