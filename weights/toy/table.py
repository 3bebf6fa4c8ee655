"""The measuring table: what is asked of each figure, and which are missed."""

# (row, key, asked of a miniature trained on a CPU, on a GPU); the sign says in which direction.
ASKED = (
    ("the classifier on fresh renders: class", "classifier class", ">= 97%", ">= 97%"),
    ("the classifier on fresh renders: instance", "classifier instance", ">= 97%", ">= 97%"),
    ("the classifier on fresh renders: place", "classifier place", ">= 97%", ">= 97%"),
    ("VAE reconstruction of fresh scenes, PSNR in dB", "psnr", ">= 27", ">= 30"),
    ("the subjects' own photos after the VAE: recognised as that instance", "vae subject", "", ""),
    ("text to image: class right", "prompt class", ">= 75%", ">= 90%"),
    ("text to image: place right", "prompt place", ">= 90%", ">= 95%"),
    ("unseen pairs of class and place: both right", "pair both", ">= 60%", ">= 80%"),
    ("subject learned: recognised as that instance", "subject", ">= 60%", ">= 80%"),
    ("subject learned: place right", "subject place", ">= 80%", ">= 85%"),
    ("class prompt after training: not the subject", "prior", ">= 85%", ">= 90%"),
    ("class prompt after training: class right", "prior class", "", ""),
    ("segmentation of the class word on fresh renders, mean IoU", "iou", ">= 0.65", ">= 0.75"),
    ("two stages: subject right", "two", "", ""),
    ("two stages: place right", "two place", "", ""),
    ("one stage at its best scale: subject right", "one", "", ""),
    ("one stage at its best scale: place right", "one place", "", ""),
    ("two stages over one, both figures added", "more", "> 0", "> 0"),
    ("insertions without a mask to be had, which count as wrong", "failed", "", ""),
    ("region that may change over the true alpha's area, median", "area", "<= 1.6", "<= 1.6"),
    ("part of the true area within that region, mean", "inside", ">= 90%", ">= 90%"),
    ("pixels changed outside the feathered mask", "outside", "<= 0", "<= 0"),
)
SHARES = ("classifier", "vae", "prompt", "pair", "subject", "prior", "two", "one", "inside")
BESIDE = ("classifier confusions", "best scale", "by class", "by place")


def met(value, asked):
    """Whether a figure is what is asked: ">= 97%", "<= 1.6", "> 0", or nothing."""
    if not asked:
        return True
    sign, bound = asked.split()
    bound = float(bound.rstrip("%")) / (100 if "%" in bound else 1)
    return {">=": value >= bound, "<=": value <= bound, ">": value > bound}[sign]


def table(found):
    """Markdown of {key: figure}: the figure and what is asked, with a mark where it is missed; then what explains them."""
    lines = ["| figure | measured | asked of a CPU | of a GPU |", "|---|---|---|---|"]
    for row, key, *asked in ASKED:
        if key in found:
            value = found[key]
            text = (
                f"{value:.1%}"
                if key.split()[0] in SHARES
                else f"{value}"
                if isinstance(value, int)
                else f"{value:.2f}"
            )
            lines.append(
                f"| {row} | {text} | "
                + " | ".join(a + ("" if met(value, a) else " (missed)") for a in asked)
                + " |"
            )
    for key in BESIDE:
        if key in found:
            lines.append(
                f"\n{key}: "
                + (
                    ", ".join(f"{k} {v:.0%}" for k, v in found[key].items())
                    if isinstance(found[key], dict)
                    else str(found[key])
                )
            )
    return "\n".join(lines)
