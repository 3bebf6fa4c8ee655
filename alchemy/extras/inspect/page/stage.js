// One run of the denoising loop: what the network sees and predicts at each step.

const sigma = ab => Math.sqrt((1 - ab) / ab);
const X_T = "<i>x<sub>t</sub></i>", X_0 = "<i>x</i><sub>0</sub>", EPS = "<i>ε</i>";
const X_PREV = "<i>x</i><sub>prev</sub>";

// Tiles with signs between them; parts are tiles and strings.
function equation(...parts) {
  return element("div.equation", {}, ...parts.map(part =>
    typeof part === "string" ? element("span.sign", {html: part}) : part[0]));
}

// The step of a stage at the noise level shown. started: false while the other stage runs alone.
function stepAt(stage, k) {
  const t = timeline.frames[k].t, found = stage.steps.findIndex(step => step.t <= t + 1e-6);
  const last = stage.steps.length - 1;
  return {k: found < 0 ? last : found, started: stage.steps[0].t >= t - 1e-6};
}

function predictionCard(stage) {
  const x_t = tile(`${X_T}: the network's input`, "x_t");
  const x_0 = tile(`predicted ${X_0}`, "x_0"), eps = tile(`predicted noise ${EPS}`, "eps");
  const row = equation(x_t, "=", x_0, "+", eps), signs = row.querySelectorAll(".sign");
  const [h, w] = stage.latent_size;
  const node = card("", "The network's prediction",
    `The network sees ${X_T}, a mixture of image and noise, and predicts the noise ${EPS}. What
     remains is its estimate of the finished image, ${X_0}: blurred at first, the mean of all
     images that are still possible. (All images here are latents of ${w} × ${h}, in colours by a
     linear map fitted to this run.)
     <b class="formula">${X_T} = √ᾱ · ${X_0} + √(1 − ᾱ) · ${EPS}</b>`, row);
  return [node, k => {
    const ab = stage.steps[k].alpha_bar;
    signs[0].innerHTML = `=<br>${Math.sqrt(ab).toFixed(3)} ×`;
    signs[1].innerHTML = `+<br>${Math.sqrt(1 - ab).toFixed(3)} ×`;
    for (const [name, [, canvas]] of Object.entries({x_t, x_0, eps})) {
      show(canvas, frame(stage.sprites[name], k));
    }
  }];
}

// Where x_prev is not the mixture that the equation shows.
const EXCEPTIONS = {
  dpmpp_2m: ` DPM-Solver++(2M) extrapolates ${X_0} from the last two predictions: the left image
    is its own, the right side is close to it.`,
  lcm: ` LCM replaces ${X_0} by <i>c</i><sub>skip</sub> · ${X_T} + <i>c</i><sub>out</sub> · ${X_0},
    which is nearly the same, and all of the noise: σ = η · √(1 − ᾱ<sub>prev</sub>).`,
  mask: ` This holds inside the mask. Outside it, the left image is the known scene (see below).`,
  hook: ` A hook may change the result: the left image is what it returned.`,
};

function samplerCard(stage) {
  const x_prev = tile(`${X_PREV}: input of the next step`, "x_prev");
  const x_0 = tile(`the same ${X_0}`, "x_0 again"), eps = tile(`the same ${EPS}`, "eps again");
  const row = equation(x_prev, "=", x_0, "+", eps, ""), signs = row.querySelectorAll(".sign");
  const node = card("", "The sampler's step",
    `The sampler mixes the two predictions again at the next, lower noise level. DDPM, DDIM and
     Euler differ only in the share σ of the noise that is drawn anew and in their timesteps.
     <b class="formula">${X_PREV} = √ᾱ<sub>prev</sub> · ${X_0} + √(1 − ᾱ<sub>prev</sub> − σ²) ·
     ${EPS} + σ · <i>z</i></b>` + (EXCEPTIONS[stage.sampler] || "") +
    (EXCEPTIONS[stage.modifier] || ""), row);
  return [node, k => {
    const {alpha_bar_prev: ab, sigma} = stage.steps[k];
    signs[0].innerHTML = `=<br>${Math.sqrt(ab).toFixed(3)} ×`;
    signs[1].innerHTML = `+<br>${Math.sqrt(Math.max(1 - ab - sigma ** 2, 0)).toFixed(3)} ×`;
    signs[2].innerHTML = sigma ? `+<br>${sigma.toFixed(3)} × <i>z</i>` : "";
    show(x_0[1], frame(stage.sprites.x_0, k));
    show(eps[1], frame(stage.sprites.eps, k));
    show(x_prev[1], afterStep(stage, k));
  }];
}

// The frame of x_prev: the next step's x_t, unless steps were left out.
function afterStep(stage, k, cut = frame) {
  const {x_prev, x_t} = stage.sprites;
  return x_prev ? cut(x_prev, k) : cut(x_t, k + 1);
}

function decodedCard(stage) {
  const [figure, canvas, caption] = tile("", "decoded"), at = stage.decoded.at;
  const node = card("", "Decoded",
    `${X_0} through the VAE, at ${at.length} of the steps (the nearest is shown).`, figure);
  return [node, k => {
    const near = nearest(at, k);
    caption.textContent = `decoded at step ${stage.steps[at[near]].index + 1}`;
    show(canvas, frame(stage.decoded, near));
  }];
}

// A curve over t with a dot per step; the step shown stands out.
function schedulePlot(stage, caption, of, ticks) {
  const T = data.alpha_bar.length * 10, values = data.alpha_bar.map(of).filter(isFinite);
  const {drawing, x, y, line, dot, move} = chart([0, T], [Math.min(...values), Math.max(...values)],
    ticks, {W: 320, H: 120, left: "t = 0: image", right: `t = ${T}: noise`});
  line(data.alpha_bar.map((ab, i) => [10 * i, of(ab)]), "curve");
  for (const step of stage.steps) dot(step.t, of(step.alpha_bar), 2, "dot");
  const mark = dot(0, 0, 5, "mark");
  return [element("figure", {}, drawing, element("figcaption", {html: caption})), k => {
    const {t, alpha_bar: ab} = stage.steps[k];
    mark.setAttribute("cx", x(t)), mark.setAttribute("cy", y(of(ab)));
    move(t);
  }];
}

function scheduleCard(stage) {
  const [share, updateShare] = schedulePlot(stage, "ᾱ, the image's share of the variance", ab => ab,
    [[0, "0"], [0.5, "0.5"], [1, "1"]]);
  const [ratio, updateRatio] = schedulePlot(stage,
    "σ = √((1 − ᾱ)/ᾱ), noise over image, logarithmic", ab => Math.log10(sigma(ab)),
    [[-1, "0.1"], [0, "1"], [1, "10"]]);
  const values = element("div");
  const node = card("", "Noise schedule",
    "The noise level at each timestep t is fixed in advance. Each dot is a step.",
    values, share, ratio);
  return [node, k => {
    const step = stage.steps[k], ab = step.alpha_bar;
    const to = step.t_prev == null ? "end" : number(step.t_prev, 4);
    values.replaceChildren(definitions([["t", `${number(step.t, 4)}→${to}`], ["ᾱ", number(ab)],
      ["σ", number(sigma(ab))], ["SNR", number(ab / (1 - ab))],
      ["std of ε", number(step.std.eps)], ["std of x₀", number(step.std.x_0)]]));
    updateShare(k), updateRatio(k);
  }];
}

function guidanceCard(stage) {
  const negative = stage.negative != null, g = number(stage.guidance), {sprites} = stage;
  const tiles = [tile(`${X_0}, uncond`, "x_0_uncond"), tile(`${X_0}, cond`, "x_0_cond"),
    tile(`${X_0}, guided`, "x_0 guided"), tile("|cond − uncond|", "guidance")];
  const uncond = `${EPS}<sub>uncond</sub>`, cond = `${EPS}<sub>cond</sub>`;
  const node = card("", "Classifier-free guidance",
    `The network predicts twice: with the prompt (cond) and
     ${negative ? "with the negative prompt" : "with zeros instead"} (uncond). Their difference is
     multiplied by ${g}.
     <b class="formula">${EPS} = ${uncond} + ${g} · (${cond} − ${uncond})</b>`,
    element("div.row.four", {}, ...tiles.map(([figure]) => figure)));
  return [node, k => {
    ["x_0_uncond", "x_0_cond", "x_0"].forEach((name, i) =>
      show(tiles[i][1], frame(sprites[name], k)));
    show(tiles[3][1], heat(sprites.guidance, k));
  }];
}

function stageView(stage) {
  const updates = [];
  const build = make => {
    const [node, update] = make(stage);
    updates.push(update);
    return node;
  };
  const wait = element("span.wait"), hasSelf = Object.keys(stage.self_attention).length > 0;
  const view = element("div.stage", {},
    stage.name ? element("h2", {}, stage.name) : null,
    stage.name ? element("p.prompt", {}, stage.prompt + " ", wait) : null,
    element("div.main", {}, build(predictionCard), build(samplerCard),
      stage.guided ? build(guidanceCard) : null),
    element("div.side", {}, build(decodedCard), build(scheduleCard)),
    stage.attention_share.length ? build(crossAttentionCard) : null,
    hasSelf ? build(selfAttentionCard) : notShown("Self-attention",
      "at this size every level of the network has more than 32 × 32 positions."));
  onStep(at => {
    const {k, started} = stepAt(stage, at), first = number(stage.steps[0].t, 4);
    wait.textContent = started ? "" : `· starts at t = ${first}; its first step is shown`;
    for (const update of updates) update(k);
  });
  return view;
}
