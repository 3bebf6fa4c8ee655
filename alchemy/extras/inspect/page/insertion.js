// insert.py's own: the scene put back at each step, how the mask came to be, the way back into the picture.

// The pictures of an insertion: what a stage ends in is told there, and a crop that is the whole scene not again.
function told() {
  const first = data.stages[0], last = data.stages[data.stages.length - 1], {scene = first.picture, crop = scene, result} = data.insertion;
  return {scene, crop, drawn: last.picture, result};
}

// The pixels of a picture where a mask is light, or, with `outside`, where it is dark; elsewhere nothing.
async function cut(film, k, outside) {
  const pixels = await frame(film, k), mask = await frame(data.insertion.latent_mask, 0);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = outside ? 255 - mask.data[i] : mask.data[i];
  return pixels;
}

function putBack(stage) {
  const inside = tile("drawn by the model, inside the mask", "inside");
  const outside = tile("the scene at the noise just reached", "outside");
  const both = tile(`${X_PREV}, where the next step begins`, "x_prev blended");
  follow(at => {
    const {k} = placed(stage, at);
    show(inside[1], next(stage, k, (film, k) => cut(film, k, false)));
    show(outside[1], next(stage, k, (film, k) => cut(film, k, true)));
    show(both[1], next(stage, k));
  });
  return card("", "The scene is put back, at every step",
    `What the model drew outside the mask <i>m</i> is thrown away; the known scene <i>k</i> takes its place, noised to the level that the
     step has just reached with one and the same noise <i>n</i>. So the model always sees the subject in its true surroundings, and fits
     it to them.
     <b class="formula">${X_PREV} ← <i>m</i> · ${X_PREV} + (1 − <i>m</i>) ·
       (√ᾱ<sub>prev</sub> · <i>k</i> + √(1 − ᾱ<sub>prev</sub>) · <i>n</i>)</b>`, equation(inside, "+", outside, "=", both));
}

// Before and after in one frame; the handle moves the border between them.
function compare() {
  const {changed, outside, seam, found} = data.insertion, {scene, result} = told(), drawn = data.stages.length > 1;
  const after = element("img", {src: result, alt: "the result"});
  const slider = element("input", {type: "range", min: 0, max: 100, value: 50, "aria-label": "scene or result", id: "compare"});
  const set = () => { after.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
  slider.addEventListener("input", set);
  set();
  const pictures = element("div.compare", {}, element("img", {src: scene, alt: "the scene"}), after);
  const text = "Left of the handle the scene as it was, right of it the result. " +
    (drawn ? "The unmodified model draws the scene with the class word; " : "The scene is a picture of your own; ") +
    (found ? `${drawn ? "its own" : "the unmodified model's"} attention says where the class stands; ` :
      "your mask says where the subject goes; ") +
    "there, and only there, the model with the LoRA draws the subject.";
  return element("section.card.hero", {}, element("div", {}, pictures, slider),
    element("div", {}, element("h3", {}, "The scene, and the subject in it"), element("p", {}, text),
      numbers([["may change", percent(changed)], ["largest difference outside", `${outside} of 255`],
        ["seam (1: none to be seen)", number(seam)]])));
}

function maskMade() {
  const tiles = data.insertion.mask.map((step, i) => {
    const [figure, canvas] = tile(`<b>${i + 1}. ${step.name}</b><br>${step.note}`, `mask ${i}`);
    show(canvas, heat(step.film, 0));
    return figure;
  });
  return card("", "How the mask came to be",
    data.insertion.found ? "From the model's own attention to the region where something may change; no other network has a part in it." :
      "It was given; the model's attention has no part in it.",
    element("div.row.four", {}, ...tiles));
}

function composite() {
  const made = data.insertion, [top, left, height, width] = made.box, shows = told();
  const shown = {
    scene: "at its own resolution",
    crop: `the part that was worked on, from (${left}, ${top}), ${width} × ${height} pixels, at the working size`,
    drawn: "what stage 2 made of it",
    result: "scene + feathered mask · (drawn − scene)",
  };
  const figures = Object.entries(shown).map(([name, note]) =>
    element("figure", {}, element("img", {src: shows[name], alt: name}), element("figcaption", {html: `<b>${name}</b><br>${note}`})));
  const [figure, canvas] = tile(
    `<b>difference</b><br>|result − scene|; the lightest is ${made.most} of 255, outside the mask it is ${made.outside}`, "difference");
  show(canvas, heat(made.difference, 0));
  return card("", "Back into the picture",
    `The VAE changes every pixel a little, also where the latents stayed. So only what the feathered mask names is taken from it; the rest
     is the scene, to the bit.`, element("div.row", {}, ...figures, figure));
}
