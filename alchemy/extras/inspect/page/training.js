// train.py's own: the loss, the loss by timestep, how far each layer has moved, previews through time.

const ERROR = `‖target − prediction(${X_T}, <i>t</i>, prompt)‖²`;

// Round numbers between two.
function round(low, high) {
  const least = (high - low) / 5, power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= least);
  return Array.from({length: 7}, (_, k) => (Math.ceil(low / step - 1e-9) + k) * step).filter(v => v <= high);
}

// Axes, lines of [x, y] and a place for more. kind of y: plain or its logarithm.
function chart(xs, ys, {log = false, x, y, H = 250}) {
  const W = 560, left = 46, bottom = 34, f = log ? Math.log10 : v => v;
  const [x0, x1] = xs, [y0, y1] = ys.map(f);
  const within = v => Math.max(Math.min(v, y1), y0);
  const at = (a, b) => [left + (a - x0) / (x1 - x0 || 1) * (W - left - 12), 10 + (y1 - within(f(b))) / (y1 - y0 || 1) * (H - 10 - bottom)];
  const ticks = log ? [0.0001, 0.001, 0.01, 0.1, 1].filter(v => f(v) >= y0 - 1e-9 && f(v) <= y1 + 1e-9) : round(...ys);
  const text = (x, y, anchor, said) => svg("text", {x, y, "text-anchor": anchor}, said);
  const drawn = svg("svg", {viewBox: `0 0 ${W} ${H}`, class: "plot"},
    ...ticks.flatMap(v => {
      const [, y] = at(x0, v);
      return [svg("line", {x1: left, x2: W - 12, y1: y, y2: y, class: "tick"}), text(left - 6, y + 3.5, "end", number(v, 2))];
    }),
    ...[x0, x1].map((v, i) => text(at(v, 1)[0], H - bottom + 14, i ? "end" : "start", number(v, 4))),
    text((left + W) / 2, H - 4, "middle", x), text(W - 12, 22, "end", y));
  const written = points => points.map(p => at(...p).map(c => c.toFixed(1)).join()).join(" ");
  const line = (points, style) => svg("polyline", {points: written(points), class: style});
  return {drawn, at, line, H, bottom};
}

function lossCurve() {
  const {losses, means, moments} = data.training, good = losses.filter(v => v != null).sort((a, b) => a - b);
  const top = good[Math.min(good.length - 1, Math.floor(good.length * 0.98))] || 1;
  const {drawn, at, line, H, bottom} = chart([0, losses.length], [0, top * 1.05], {x: "step", y: "loss", H: 390});
  const stride = Math.ceil(losses.length / 2000);  // no screen shows more
  const thinned = values => values.map((v, i) => [i + 1, v]).filter(([, v], i) => v != null && i % stride === 0);
  const r = losses.length < 200 ? 3 : 2;
  for (const [cx, cy] of thinned(losses).map(p => at(...p))) drawn.append(svg("circle", {cx, cy, r, class: "dot faint"}));
  drawn.append(line(thinned(means), "curve strong"));
  const rule = svg("line", {y1: 8, y2: H - bottom, class: "rule"});
  drawn.append(rule);
  follow(k => { const [x] = at(moments[k], 0); rule.setAttribute("x1", x), rule.setAttribute("x2", x); });
  const {method, captions, prior_weight: weight} = data.facts, prior = weight && !captions && method !== "textual-inversion";
  return card("", "The loss",
    `A dot for each step, the line is their running mean. One step sees a few timesteps only, drawn by chance, and some are much harder than
     others: hence the dots' spread.
     <b class="formula"><i>w<sub>t</sub></i> · ${ERROR}${prior ? " + <i>λ</i> · (the class stays as it was)" : ""}</b>`, drawn);
}

// When the page's first look was taken: of a run that was resumed, the curve of the loss alone goes further back.
function beginning() {
  const [begin] = data.training.moments;
  return begin ? `after step ${begin}, where the run was resumed` : "before the first step";
}

function lossByTimestep() {
  const {timesteps, by_t, moments} = data.training, first = beginning(), all = by_t.flatMap(([, row]) => row);
  const ratios = by_t.map(([, row]) => row.map((v, j) => v / by_t[0][1][j]));
  const x = "timestep t: 0 is clean, the end is noise", T = data.training.T;
  const plain = chart([0, T], [Math.min(...all) / 1.3, Math.max(...all) * 1.3], {log: true, x, y: "error, logarithmic", H: 180});
  const ratio = chart([0, T], [Math.min(0.95, ...ratios.flat()), Math.max(1.05, ...ratios.flat())],
    {x, y: `the same, over what it was ${first}`, H: 200});
  const lines = [[plain, by_t.map(([, row]) => row)], [ratio, ratios]].map(([where, rows]) => rows.map((row, i) => {
    const made = where.line(row.map((v, j) => [timesteps[j], v]), "curve" + (i ? "" : " first"));
    where.drawn.append(made);
    return made;
  }));
  const said = element("figcaption");
  follow(k => {
    const now = by_t.reduce((best, [step], i) => step <= moments[k] ? i : best, 0);
    for (const those of lines) those.forEach((made, i) => made.classList.toggle("strong", i === now));
    said.textContent = `thick: after step ${by_t[now][0]}; dashed: ${first}`;
  });
  return card("", "The loss by timestep",
    `The same pictures with the same noise, at each noise level, measured ${by_t.length} times: what has been learned, and where. With
     little noise (left) the noise is hard to see and the error large; with much (right) all is noise, and the question is what the
     subject is.
     <b class="formula">${ERROR}</b>`, plain.drawn, ratio.drawn, said);
}

const ROWS = [["attn1.to_q", "self q"], ["attn1.to_k", "self k"], ["attn1.to_v", "self v"], ["attn1.to_out", "self out"],
  ["attn2.to_q", "cross q"], ["attn2.to_k", "cross k"], ["attn2.to_v", "cross v"], ["attn2.to_out", "cross out"]];

function heatMap() {
  const {network, moments} = data.training, most = Math.max(1e-12, ...network.flatMap(([, rows]) => Object.values(rows).flat()));
  const groups = [];
  for (const [block] of network) {
    const name = block.startsWith("mid") ? "mid" : block.split("_")[0] + " " + block.split(".")[1];
    if (groups.length && groups[groups.length - 1][0] === name) groups[groups.length - 1][1]++;
    else groups.push([name, 1]);
  }
  const cells = [], body = ROWS.map(([key, label]) => element("tr", {}, element("th", {}, label), ...network.map(([block, rows]) => {
    const cell = element("td", {"data-layer": `${block}.${key}`});
    cells.push([cell, rows[key], `${block}.${key}`]);
    return cell;
  })));
  const said = element("figcaption");
  follow(k => {
    for (const [cell, norms, name] of cells) {
      const value = norms ? norms[k] : 0;
      cell.style.background = `rgb(${COLOURS[Math.round(255 * value / most)]})`;
      cell.title = `${name}: ${percent(value)}`;
    }
    said.textContent = `after step ${moments[k]}; black is 0, the lightest ${percent(most)} (point at a cell for its own)`;
  });
  const top = element("tr", {}, element("th"), ...groups.map(([name, span]) => element("th", {colspan: span}, name)));
  return card(".full", "How far each layer has moved",
    `A column for each transformer block, in the order in which the network runs them; a row for each projection that a LoRA sits on.
     <b class="formula">‖<i>α/r · B A</i>‖ / ‖<i>W</i>‖</b>`, element("table.heat", {}, top, ...body), said);
}

function previewGrid() {
  const {previews, moments} = data.training, captions = data.facts.captions, prompts = previews[0][1].map(([prompt]) => prompt);
  const columns = previews.map(([step, row]) => element("div.column", {}, element("div.label", {}, `step ${step}`),
    ...row.map(([prompt, src]) => element("img", {src, alt: `${prompt}, step ${step}`}))));
  follow(k => {
    const now = previews.reduce((best, [step], i) => step <= moments[k] ? i : best, -1);
    columns.forEach((column, i) => column.classList.toggle("now", i === now));
  });
  return card(".full", "What it draws, through time",
    `The same seed each time, ${prompts.length} prompts from top to bottom. ` + (captions ? "They are captions of the pictures." :
     "The first should become what is taught; the others should stay what they are."),
    element("ol.prompts", {}, ...prompts.map(prompt => element("li", {}, prompt))), element("div.columns", {}, ...columns));
}

function trainingView() {
  const made = data.training;
  return element("div.lesson", {}, made.losses.length ? lossCurve() : null, made.by_t.length ? lossByTimestep() : null,
    made.previews.length ? previewGrid() : absent("What it draws, through time", "the run drew no previews (--preview-every 0)."),
    made.network.length ? heatMap() : absent("How far each layer has moved", "there is no LoRA whose size could be measured."));
}
