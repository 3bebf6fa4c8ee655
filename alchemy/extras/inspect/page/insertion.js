// insert.py: the background in stage 2, how the mask was made, the composite.

// Each image of the insertion; those that a stage shows are stored there.
function insertionImages() {
  const first = data.stages[0], last = data.stages[data.stages.length - 1];
  const {scene = first.image, crop = scene, result} = data.insertion;
  return {scene, crop, generated: last.image, result};
}

// A frame, transparent outside the latent mask, or inside it.
async function masked(sprites, k, outside) {
  const image = await frame(sprites, k), mask = await frame(data.insertion.latent_mask, 0);
  for (let i = 0; i < image.data.length; i += 4) {
    image.data[i + 3] = outside ? 255 - mask.data[i] : mask.data[i];
  }
  return image;
}

function backgroundCard(stage) {
  const inside = tile("generated, inside the mask", "inside");
  const outside = tile("the scene, noised to the level of the step", "outside");
  const both = tile(`${X_PREV}: input of the next step`, "x_prev blended");
  onStep(at => {
    const {k} = stepAt(stage, at);
    show(inside[1], afterStep(stage, k, (sprites, j) => masked(sprites, j, false)));
    show(outside[1], afterStep(stage, k, (sprites, j) => masked(sprites, j, true)));
    show(both[1], afterStep(stage, k));
  });
  return card("", "The background is restored at every step",
    `Outside the mask <i>m</i>, the known scene <i>k</i> replaces what was generated, noised to the
     level that the step has just reached, with the same noise <i>n</i> at every step. So the
     network always sees the subject in its true surroundings.
     <b class="formula">${X_PREV} ← <i>m</i> · ${X_PREV} + (1 − <i>m</i>) ·
       (√ᾱ<sub>prev</sub> · <i>k</i> + √(1 − ᾱ<sub>prev</sub>) · <i>n</i>)</b>`,
    equation(inside, "+", outside, "=", both));
}

// Before and after in one frame; the slider moves the border.
function compareCard() {
  const {changed_share, difference_outside, seam, segmented} = data.insertion;
  const {scene, result} = insertionImages(), generated = data.stages.length > 1;
  const after = element("img", {src: result, alt: "the result"});
  const slider = element("input", {type: "range", min: 0, max: 100, value: 50, id: "compare",
    "aria-label": "scene or result"});
  const set = () => { after.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
  slider.addEventListener("input", set);
  set();
  const text = "Left of the slider: the scene. Right of it: the result. " +
    (generated ? "The base model generates the scene from the class word. "
      : "The scene is your own image. ") +
    (segmented ? "The base model's attention finds the class in it. "
      : "Your mask says where the subject goes. ") +
    "There, and only there, the model with the LoRA generates the subject.";
  return element("section.card.hero", {},
    element("div", {}, element("div.compare", {}, element("img", {src: scene, alt: "the scene"}),
      after), slider),
    element("div", {}, element("h3", {}, "Scene and result"), element("p", {}, text),
      definitions([["may change", percent(changed_share)],
        ["largest difference outside", `${difference_outside} of 255`],
        ["seam (1: as in the scene)", number(seam)]])));
}

function maskCard() {
  const tiles = data.insertion.mask.map((step, i) => {
    const [figure, canvas] = tile(`<b>${i + 1}. ${step.name}</b><br>${step.note}`, `mask ${i}`);
    show(canvas, heat(step.sprite, 0));
    return figure;
  });
  const text = data.insertion.segmented
    ? "From the model's own attention to the region that may change. No other network is used."
    : "The mask was given; the model's attention is not used.";
  return card("", "How the mask was made", text, element("div.row.four", {}, ...tiles));
}

function compositeCard() {
  const {box: [top, left, height, width], largest_difference, difference_outside} = data.insertion;
  const shown = insertionImages();
  const notes = {
    scene: "at its own resolution",
    crop: `input of stage 2: from (${left}, ${top}), ${width} × ${height} pixels`,
    generated: "output of stage 2",
    result: "scene + feathered mask · (generated − scene)",
  };
  const figures = Object.entries(notes).map(([name, note]) => element("figure", {},
    element("img", {src: shown[name], alt: name}),
    element("figcaption", {html: `<b>${name}</b><br>${note}`})));
  const [figure, canvas] = tile(`<b>difference</b><br>|result − scene|; maximum
    ${largest_difference} of 255, outside the mask ${difference_outside}`, "difference");
  show(canvas, heat(data.insertion.difference, 0));
  return card("", "Composite",
    `The VAE changes every pixel a little, even where the latents did not change. So only the
     pixels of the feathered mask are taken from its output; all others are bit-identical to the
     scene.`, element("div.row", {}, ...figures, figure));
}
