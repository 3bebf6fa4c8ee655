// Attention: positions to tokens (cross-attention), positions to positions (self-attention).

const ENCODERS = ["tokenizer (CLIP ViT-L)", "tokenizer_2 (OpenCLIP ViT-bigG)"];
const bestLevel = stage => stage.cross.all || Object.values(stage.cross)[0];

// A button per token; those of the first tokenizer show their mean map and share.
function tokenButtons(stage, {tokens}, encoder, select) {
  const buttons = tokens.map(([id, text], i) => {
    const share = stage.attention_share.reduce((sum, row) => sum + row[i], 0) /
      stage.attention_share.length;
    // Several tokens can form one character; the bytes of one alone have no spelling.
    const label = text.includes("\uFFFD") ? "part of a character" : text;
    const button = element("button.chip", {type: "button", "data-token": i,
      title: `position ${i}, id ${id}`, onclick: () => select(i)});
    if (encoder === 0) {
      const sprites = bestLevel(stage).sprites[i], canvas = element("canvas", {});
      canvas.width = canvas.height = 1;
      show(canvas, heat(sprites, sprites.n - 1));
      button.append(canvas);
    }
    button.append(element("b", {}, label),
      element("small", {}, encoder === 0 ? `${id} · ${percent(share)}` : `${id}`));
    return button;
  });
  return element("div.chips", {}, ...buttons);
}

function evenly(list, most) {
  const n = Math.min(list.length, most);
  const at = i => list[Math.round(i * (list.length - 1) / Math.max(n - 1, 1))];
  return Array.from({length: n}, (_, i) => at(i));
}

function crossAttentionCard(stage) {
  const levels = Object.keys(stage.cross), [{tokens, truncated}] = stage.tokens;
  const at = stage.cross[levels[0]].at, chosen = evenly(at, 10);  // long prompts: not every step
  const now = levels.map(level => tile("", `cross ${level}`));
  const mean = levels.map(level => tile("", `mean ${level}`));
  const strip = element("div.strip"), summary = element("p");
  // The word that the page is about comes first, else the token with the clearest map.
  const peak = i => stage.cross[levels[0]].range[i][1];
  const clearest = tokens.map((_, i) => i).slice(1, -1)
    .reduce((best, i) => peak(i) > peak(best) ? i : best, 1);
  let token = stage.focus || clearest, step = 0;

  function update() {
    const near = nearest(at, step), x_0 = stage.sprites.x_0;
    const which = at[near] === step ? "this step" : `step ${stage.steps[at[near]].index + 1}`;
    for (const [i, level] of levels.entries()) {
      const sprites = stage.cross[level].sprites[token];
      const [low, high] = stage.cross[level].range[token], all = level === "all";
      const range = all ? `${number(low, 2)} to ${number(high, 2)} times the mean`
        : `${percent(low)} to ${percent(high)}`;
      show(now[i][1], heat(sprites, near, x_0, at[near]));
      show(mean[i][1], heat(sprites, sprites.n - 1, x_0, stage.steps.length - 1));
      now[i][2].textContent = `${all ? "all levels" : `level ${level}`}, ${which}`;
      mean[i][2].textContent = `mean over the steps; dark to light: ${range}`;
    }
    const shares = stage.attention_share[step], sum = shares.reduce((a, b) => a + b, 0);
    summary.textContent = `“${tokens[token][1]}” gets ${percent(shares[token])} of all attention ` +
      (tokens.length < 77 ? `at this step; all ${tokens.length} tokens get ${percent(sum)}, the ` +
        "padding after them the rest." : "at this step; the prompt fills all 77 tokens.");
    for (const button of node.querySelectorAll(".chip")) {
      button.setAttribute("aria-pressed", button.dataset.token == token);
    }
    chosen.forEach((k, i) => strip.children[i].classList.toggle("now", k === at[near]));
  }

  function select(i) {
    token = i;
    strip.replaceChildren(...chosen.map(k => {
      const {t, index} = stage.steps[k];
      const [figure, canvas] = tile(`t ${number(t)}`, `strip ${k}`);
      show(canvas, heat(bestLevel(stage).sprites[token], at.indexOf(k)));
      const jump = () => go(timeline.frames.findIndex(frame => frame.t <= t + 1e-6));
      return element("button", {type: "button", "aria-label": `go to step ${index + 1}`,
        onclick: jump}, figure);
    }));
    update();
  }

  const row = tiles => element("div.row", {}, ...tiles.map(([figure]) => figure));
  const node = card(".full", "Cross-attention: which positions attend to which token",
    `Each position of the image distributes an attention of 1 over the 77 tokens of the prompt.
     Select a token: light positions attend to it. The start, the end and the padding take the
     attention that no word needs.
     <b class="formula">softmax(<i>q k</i>ᵀ/√<i>d</i>), <i>q</i> from positions, <i>k</i> from
     tokens</b>
     Shown: the mean over the heads and layers of a level${stage.guided ? ", cond" : ""}.`,
    ...stage.tokens.flatMap((split, i) => [element("div.label", {}, ENCODERS[i]),
      tokenButtons(stage, split, i, select)]),
    truncated ? element("p.wait", {}, `Too long: this is cut off: ${truncated}`) : null,
    summary, element("div.pair", {}, row(now), row(mean)),
    element("div.label", {}, "over the steps (click to go there)"), strip);
  select(token);
  return [node, k => { step = k; update(); }];
}

function selfAttentionCard(stage) {
  const levels = Object.keys(stage.self_attention), row = element("div.row");
  const choice = element("div.chips");
  const [figure, canvas] = tile("click a position, or use the arrow keys", "position");
  canvas.className = "pick";
  canvas.tabIndex = 0;
  const finer = (best, level) =>
    stage.self_attention[level].w > stage.self_attention[best].w ? level : best;
  let level = levels.reduce(finer), position = [0.5, 0.5];

  // Row q of the (positions x positions) matrix is what position q attends to.
  async function map(k, src, q, {w, h}) {
    const {data} = await pixels(src, 0, q, w * h, 1);
    return colorize({width: w, height: h, data}, await frame(stage.sprites.x_0, k));
  }

  async function update() {
    const own = stage.self_attention[level], {w, h} = own;
    const column = Math.floor(position[0] * w), line = Math.floor(position[1] * h);
    row.replaceChildren(...own.at.map((k, i) => {
      const [figure, canvas] = tile(`t ${number(stage.steps[k].t)}`, `self ${k}`);
      show(canvas, map(k, own.src[i], line * w + column, own));
      return figure;
    }));
    choice.replaceChildren(...levels.map(name => element("button.chip", {type: "button",
      "aria-pressed": String(name === level), onclick: () => { level = name; update(); }},
      element("b", {}, `level ${name}`))));

    const image = await loadImage(stage.image), context = canvas.getContext("2d");
    canvas.width = image.width, canvas.height = image.height;
    context.drawImage(image, 0, 0);
    const cell = [image.width / w, image.height / h];
    for (const [color, width] of [["#000", 3], ["#fff", 1.5]]) {
      context.lineWidth = width * Math.max(1, image.width / 256), context.strokeStyle = color;
      context.strokeRect(column * cell[0], line * cell[1], ...cell);
    }
  }

  function select(x, y) {
    position = [x, y].map(v => Math.max(0, Math.min(0.999, v)));
    update();
  }
  canvas.addEventListener("click", event => {
    const box = canvas.getBoundingClientRect();
    select((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
  canvas.addEventListener("keydown", event => {
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const move = moves[event.key], {w, h} = stage.self_attention[level];
    if (!move) return;
    select(position[0] + move[0] / w, position[1] + move[1] / h);
    event.preventDefault();
  });
  update();
  const node = card(".full", "Self-attention: which positions attend to each other",
    `Select a position in the image: light positions are those that it attends to, each map scaled
     to its own maximum. Positions of one object attend to each other.
     <b class="formula">softmax(<i>q k</i>ᵀ/√<i>d</i>), <i>q</i> and <i>k</i> from positions</b>`,
    levels.length > 1 ? choice : null, element("div.places", {}, figure, row));
  return [node, () => {}];
}
