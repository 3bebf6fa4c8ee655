// train.py: loss, loss by timestep, how far each layer has moved, previews.

const ERROR = `‖target − prediction(${X_T}, <i>t</i>, prompt)‖²`;

// Round numbers from low to high.
function ticksBetween(low, high) {
  const least = (high - low) / 5, power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= least);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: 7}, (_, k) => (first + k) * step).filter(v => v <= high);
}

// Axes for lines of [x, y]; with `log`, y is logarithmic.
function chart([x0, x1], yRange, {log = false, xLabel, yLabel, H = 250}) {
  const W = 560, left = 46, bottom = 34, f = log ? Math.log10 : v => v, [y0, y1] = yRange.map(f);
  const x = v => left + (v - x0) / (x1 - x0 || 1) * (W - left - 12);
  const clipped = v => Math.max(Math.min(f(v), y1), y0);
  const y = v => 10 + (y1 - clipped(v)) / (y1 - y0 || 1) * (H - 10 - bottom);
  const text = (x, y, anchor, label) => svg("text", {x, y, "text-anchor": anchor}, label);
  const powers = [0.0001, 0.001, 0.01, 0.1, 1];
  const ticks = log ? powers.filter(v => f(v) >= y0 && f(v) <= y1) : ticksBetween(...yRange);
  const grid = ticks.flatMap(v => [
    svg("line", {x1: left, x2: W - 12, y1: y(v), y2: y(v), class: "tick"}),
    text(left - 6, y(v) + 3.5, "end", number(v, 2))]);
  const drawing = svg("svg", {viewBox: `0 0 ${W} ${H}`, class: "plot"}, ...grid,
    text(x(x0), H - bottom + 14, "start", number(x0, 4)),
    text(x(x1), H - bottom + 14, "end", number(x1, 4)),
    text((left + W) / 2, H - 4, "middle", xLabel), text(W - 12, 22, "end", yLabel));
  const point = ([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`;
  const line = (points, classes) =>
    svg("polyline", {points: points.map(point).join(" "), class: classes});
  return {drawing, x, y, line, base: H - bottom};
}

function lossCard() {
  const {losses, means, recorded_steps: steps} = data.training;
  const sorted = losses.filter(v => v != null).sort((a, b) => a - b);
  const top = sorted[Math.floor(0.98 * (sorted.length - 1))] || 1;
  const {drawing, x, y, line, base} = chart([0, losses.length], [0, top * 1.05],
    {xLabel: "step", yLabel: "loss", H: 390});
  const stride = Math.ceil(losses.length / 2000);  // more points than a screen has pixels
  const points = values => values.map((v, i) => [i + 1, v])
    .filter(([step, v]) => v != null && (step - 1) % stride === 0);
  const r = losses.length < 200 ? 3 : 2;
  for (const [step, v] of points(losses)) {
    drawing.append(svg("circle", {cx: x(step), cy: y(v), r, class: "dot faint"}));
  }
  const rule = svg("line", {y1: 8, y2: base, class: "rule"});
  drawing.append(line(points(means), "curve strong"), rule);
  onStep(k => {
    const at = x(steps[k]);
    rule.setAttribute("x1", at), rule.setAttribute("x2", at);
  });
  const {method, captions, prior_weight: weight} = data.metadata;
  const prior = weight && !captions && method !== "textual-inversion";
  return card("", "Loss",
    `One dot per step; the line is the running mean. A step sees a few random timesteps, and some
     are much harder than others: hence the spread.
     <b class="formula"><i>w<sub>t</sub></i> · ${ERROR}${prior ? " + <i>λ</i> · prior" : ""}</b>`,
    drawing);
}

function timestepCard() {
  const {timesteps, loss_by_timestep: measured, recorded_steps: steps, num_timesteps: T} =
    data.training;
  const rows = measured.map(([, row]) => row), ratios = rows.map(row =>
    row.map((v, j) => v / rows[0][j]));
  const first = steps[0] ? `after step ${steps[0]}, where the run was resumed`
    : "before the first step";
  const xLabel = "timestep t (0: image, end: noise)";
  const absolute = chart([0, T], [Math.min(...rows.flat()) / 1.3, Math.max(...rows.flat()) * 1.3],
    {log: true, xLabel, yLabel: "loss, logarithmic", H: 180});
  const relative = chart([0, T],
    [Math.min(0.95, ...ratios.flat()), Math.max(1.05, ...ratios.flat())],
    {xLabel, yLabel: `relative to its value ${first}`, H: 200});
  const draw = (chart, rows) => rows.map((row, i) => {
    const points = row.map((v, j) => [timesteps[j], v]);
    const line = chart.line(points, "curve" + (i ? "" : " first"));
    chart.drawing.append(line);
    return line;
  });
  const lines = [draw(absolute, rows), draw(relative, ratios)];
  const caption = element("figcaption");
  onStep(k => {
    const now = measured.findLastIndex(([step]) => step <= steps[k]);
    for (const group of lines) group.forEach((l, i) => l.classList.toggle("strong", i === now));
    caption.textContent = `thick: after step ${measured[now][0]}; dashed: ${first}`;
  });
  return card("", "Loss by timestep",
    `The same images with the same noise at each timestep, measured ${rows.length} times: at which
     noise levels the model has improved.
     <b class="formula">${ERROR}</b>`, absolute.drawing, relative.drawing, caption);
}

const PROJECTIONS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "attn2.to_q",
  "attn2.to_k", "attn2.to_v", "attn2.to_out"];

function normCard() {
  const {network, recorded_steps: steps} = data.training, cells = [], groups = [];
  const values = network.flatMap(([, rows]) => Object.values(rows).flat());
  const most = Math.max(1e-12, ...values);
  for (const [block] of network) {
    const [part, index] = block.split(".");
    const name = part.startsWith("mid") ? "mid" : `${part.split("_")[0]} ${index}`;
    const last = groups[groups.length - 1];
    if (last && last[0] === name) last[1]++;
    else groups.push([name, 1]);
  }
  const body = PROJECTIONS.map(key => {
    const label = key.replace("attn1.to_", "self ").replace("attn2.to_", "cross ");
    return element("tr", {}, element("th", {}, label), ...network.map(([block, rows]) => {
      const cell = element("td", {"data-layer": `${block}.${key}`});
      cells.push([cell, rows[key], `${block}.${key}`]);
      return cell;
    }));
  });
  const caption = element("figcaption");
  onStep(k => {
    for (const [cell, norms, name] of cells) {
      const value = norms ? norms[k] : 0;
      cell.style.background = `rgb(${COLORS[Math.round(255 * value / most)]})`;
      cell.title = `${name}: ${percent(value)}`;
    }
    caption.textContent = `after step ${steps[k]}; black: 0, lightest: ${percent(most)} ` +
      "(hover over a cell for its value)";
  });
  const header = groups.map(([name, span]) => element("th", {colspan: span}, name));
  return card(".full", "How far each layer has moved",
    `The norm of each layer's change over that of its weights. A column per transformer block, in
     the order of the network; a row per projection with a LoRA.
     <b class="formula">‖<i>α/r · B A</i>‖ / ‖<i>W</i>‖</b>`,
    element("table.heat", {}, element("tr", {}, element("th"), ...header), ...body), caption);
}

function previewCard() {
  const {previews, recorded_steps: steps} = data.training;
  const prompts = previews[0][1].map(([prompt]) => prompt);
  const columns = previews.map(([step, row]) => element("div.column", {},
    element("div.label", {}, `step ${step}`),
    ...row.map(([prompt, src]) => element("img", {src, alt: `${prompt}, step ${step}`}))));
  onStep(k => {
    const now = previews.findLastIndex(([step]) => step <= steps[k]);
    columns.forEach((column, i) => column.classList.toggle("now", i === now));
  });
  return card(".full", "Previews",
    `${prompts.length} prompts from top to bottom, always with the same seed. ` +
    (data.metadata.captions ? "They are captions of the training images."
      : "The first should become the subject; the others should not change."),
    element("ol.prompts", {}, ...prompts.map(prompt => element("li", {}, prompt))),
    element("div.columns", {}, ...columns));
}

function trainingView() {
  const {losses, loss_by_timestep, previews, network} = data.training;
  return element("div.training", {},
    losses.length ? lossCard() : null, loss_by_timestep.length ? timestepCard() : null,
    previews.length ? previewCard()
      : notShown("Previews", "the run generated none (--preview-every 0)."),
    network.length ? normCard()
      : notShown("How far each layer has moved", "there is no LoRA to measure."));
}
