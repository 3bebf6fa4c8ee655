// Attention: from a word to places (cross-attention), from a place to places (self-attention).

const ENCODERS = ["tokenizer (CLIP ViT-L)", "tokenizer_2 (OpenCLIP ViT-bigG)"];

function chips(stage, pick) {
  const rows = stage.tokens.map((cut, n) => element("div.chips", {}, ...cut.pieces.map(([id, text], i) => {
    const button = element("button.chip", {type: "button", "data-token": i, title: `position ${i}, id ${id}`, onclick: () => pick(i)});
    const canvas = n === 0 && i < stage.mass[0].length ? element("canvas", {width: 1, height: 1}) : null;
    const mean = stage.mass.reduce((sum, row) => sum + row[i], 0) / stage.mass.length;
    button.append(...[canvas, element("b", {}, text), element("small", {}, canvas ? `${id} · ${percent(mean)}` : `${id}`)].filter(Boolean));
    if (canvas) {
      const best = stage.cross.all || Object.values(stage.cross)[0];
      show(canvas, heat(best.films[i], best.films[i].n - 1));
    }
    return button;
  })));
  const lost = stage.tokens[0].lost;
  return element("div", {}, ...rows.flatMap((row, n) => [element("div.label", {}, ENCODERS[n]), row]),
    lost ? element("p.wait", {}, `Too long: these words are lost: ${lost}`) : null);
}

function words(stage) {
  const levels = Object.keys(stage.cross), now = levels.map(level => tile("", `cross ${level}`)), mean = levels.map(level => tile("", `mean ${level}`));
  const strip = element("div.strip"), said = element("p.said");
  const cut = stage.tokens[0].pieces;
  const peak = i => stage.cross[levels[0]].range[i][1];
  let token = stage.focus || cut.map((_, i) => i).slice(1, -1).reduce((best, i) => peak(i) > peak(best) ? i : best, 1), at = 0;  // else the one with the clearest place
  const chosen = [...new Set(Array.from({length: Math.min(10, stage.steps.length)}, (_, i, n = Math.min(10, stage.steps.length)) => Math.round(i * (stage.steps.length - 1) / Math.max(n - 1, 1))))];

  function update() {
    for (const [i, level] of levels.entries()) {
      const film = stage.cross[level].films[token], [low, high] = stage.cross[level].range[token];
      show(now[i][1], heat(film, at, stage.films.x_0, at));
      show(mean[i][1], heat(film, film.n - 1, stage.films.x_0, stage.steps.length - 1));
      const scale = level === "all" ? `${number(low, 2)} to ${number(high, 2)} times the mean` : `${percent(low)} to ${percent(high)}`;
      now[i][2].textContent = (level === "all" ? "all levels" : `level ${level}`) + ", this step";
      mean[i][2].textContent = `mean over the steps; dark to light: ${scale}`;
    }
    said.textContent = `“${cut[token][1]}” gets ${percent(stage.mass[at][token])} of all attention at this step, all ${cut.length} tokens together ${percent(stage.mass[at].reduce((sum, x) => sum + x, 0))}, the padding behind them the rest.`;
    for (const button of made.querySelectorAll(".chip")) button.setAttribute("aria-pressed", button.dataset.token == token);
    for (const [i, k] of chosen.entries()) strip.children[i].classList.toggle("now", k === at);
  }
  function pick(i) {
    token = i;
    const level = stage.cross.all || stage.cross[levels[0]];
    strip.replaceChildren(...chosen.map(k => {
      const [figure, canvas, caption] = tile(`t ${number(stage.steps[k].t, 3)}`, `strip ${k}`);
      show(canvas, heat(level.films[token], k));
      figure.addEventListener("click", () => go(time.frames.findIndex(step => step.t <= stage.steps[k].t + 1e-6)));
      return figure;
    }));
    update();
  }
  const made = card(".full", "Which places look at which word",
    `In cross-attention each place of the picture spreads one unit of attention over the 77 tokens of the prompt. Pick a token: light places look at it.
     The start, the end and the padding say little; what goes there is how a place looks away.
     <b class="formula">softmax(<i>q k</i>ᵀ/√<i>d</i>), <i>q</i> from places, <i>k</i> from tokens</b> Here: the mean over the heads and layers of a level, of the half of the batch that is told the prompt.`,
    chips(stage, pick), said, element("div.pair", {}, element("div.row", {}, ...now.map(([figure]) => figure)), element("div.row", {}, ...mean.map(([figure]) => figure))),
    element("div.label", {}, "through the steps (click to go there)"), strip);
  pick(token);
  return [made, k => { at = k; update(); }];
}

function places(stage) {
  const levels = Object.keys(stage.own), shown = element("div.row"), choice = element("div.chips");
  const [figure, canvas] = tile("click a place", "place");
  canvas.className = "pick";
  let level = levels.reduce((best, l) => stage.own[l].w > stage.own[best].w ? l : best), place = [0.5, 0.5];

  async function update() {
    const {w, h, at, src} = stage.own[level], q = Math.floor(place[1] * h) * w + Math.floor(place[0] * w);
    const tiles = at.map(k => tile(`t ${number(stage.steps[k].t, 3)}`, `own ${k}`));
    for (const [i, k] of at.entries()) {
      const film = stage.films.x_0, under = await frame(film, k), context = surface(w * h, 1);
      context.drawImage(await picture(src[i]), 0, q, w * h, 1, 0, 0, w * h, 1);
      const row = context.getImageData(0, 0, w * h, 1).data;
      show(tiles[i][1], Promise.resolve(coloured({width: w, height: h, data: row}, under)));
    }
    shown.replaceChildren(...tiles.map(([f]) => f));
    choice.replaceChildren(...levels.map(l => element("button.chip", {type: "button", "aria-pressed": String(l === level), onclick: () => { level = l; update(); }}, element("b", {}, `level ${l}`))));
    const image = await picture(stage.picture), context = canvas.getContext("2d");
    canvas.width = image.width, canvas.height = image.height;
    context.drawImage(image, 0, 0);
    const cell = [image.width / w, image.height / h], corner = [q % w * cell[0], Math.floor(q / w) * cell[1]];
    for (const [colour, width] of [["#000", 3], ["#fff", 1.5]]) {
      context.lineWidth = width * Math.max(1, image.width / 256), context.strokeStyle = colour;
      context.strokeRect(...corner, ...cell);
    }
  }
  canvas.addEventListener("click", event => {
    const box = canvas.getBoundingClientRect();
    place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(x => Math.max(0, Math.min(0.999, x)));
    update();
  });
  update();
  return [card(".full", "Which places look at which places",
    `In self-attention the places look at each other: this is how the left ear knows where the right one is. Pick a place in the picture; light is what it attends to,
     each map by its own largest. <b class="formula">softmax(<i>q k</i>ᵀ/√<i>d</i>), <i>q</i> and <i>k</i> from places</b>`,
    levels.length > 1 ? choice : null, element("div.places", {}, figure, shown)), () => {}];
}
