// train.py: loss, how far each layer has moved, previews.

function lossCard() {
  const {losses, means, recorded_steps: steps} = data.training;
  const sorted = losses.filter(v => v != null).sort((a, b) => a - b);
  const top = sorted[Math.floor(0.98 * (sorted.length - 1))] || 1;
  const ticks = [0, 0.25, 0.5, 0.75, 1].map(share => [share * top, number(share * top, 2)]);
  const {drawing, line, dot, move} = chart([0, losses.length], [0, top * 1.05], ticks,
    {W: 1120, H: 300, left: "step 0", right: `step ${losses.length}`});
  const stride = Math.ceil(losses.length / 2000);  // more points than a screen has pixels
  const points = values => values.map((v, i) => [i + 1, v])
    .filter(([step, v]) => v != null && (step - 1) % stride === 0);
  for (const [step, v] of points(losses)) dot(step, v, 3, "dot faint");
  line(points(means), "curve strong");
  onStep(k => move(steps[k]));
  const {method, captions, prior_weight: weight} = data.metadata;
  const prior = weight && !captions && method !== "textual-inversion";
  return card(".full", "Loss",
    `One dot per step; the line is the running mean. A step sees a few random timesteps, and some
     are much harder than others: hence the spread.
     <b class="formula"><i>w<sub>t</sub></i> · ‖target − prediction(${X_T}, <i>t</i>, prompt)‖²` +
     `${prior ? " + <i>λ</i> · prior" : ""}</b>`, drawing);
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
  const {losses, previews, network} = data.training;
  return element("div.training", {}, losses.length ? lossCard() : null,
    previews.length ? previewCard()
      : notShown("Previews", "the run generated none (--preview-every 0)."),
    network.length ? normCard()
      : notShown("How far each layer has moved", "there is no LoRA to measure."));
}
