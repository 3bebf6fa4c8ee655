"""Likeness to photos: the vision transformers, their preprocessing, the figures, the benchmark."""

FAULTS = {
    ("extras/vision", "extras/vision"): (
        (
            "CLS is the last token",
            "[cls, patches.flatten(2).transpose(1, 2)]",
            "[patches.flatten(2).transpose(1, 2), cls]",
        ),
        (
            "the feature of a patch",
            "model.post_layernorm(x[:, 0])",
            "model.post_layernorm(x[:, 1])",
        ),
        (
            "the feature is the mean of all tokens",
            "model.post_layernorm(x[:, 0])",
            "model.post_layernorm(x.mean(1))",
        ),
        ("no LayerNorm before the layers", "x = model.pre_layrnorm(x)", "pass"),
        ("no LayerNorm after them", "cls = model.post_layernorm(x[:, 0])", "cls = x[:, 0]"),
        ("eps is the default's", "eps=config.layer_norm_eps)", "eps=1e-5)"),
        ("CLIP is not projected", "self.visual_projection(cls) if", "cls if"),
        (
            "the half's own projection_dim",
            '| {"projection_dim": config.get(',
            '| {"_": config.get(',
        ),
        ("patches look back only", "causal=False", "causal=True"),
        ("positions by bilinear", 'mode="bicubic"', 'mode="bilinear"'),
        ("positions with aligned corners", "align_corners=False", "align_corners=True"),
        ("positions of a transposed grid", "grid[0].flatten(1).T", "grid[0].mT.flatten(1).T"),
        ("height and width are swapped", "(height, width), mode", "(width, height), mode"),
        ("CLS has the position of a patch", "[weight[:1], grid", "[weight[1:2], grid"),
        ("DINO's query is its key", '"attention.attention.query"', '"attention.attention.key"'),
        (
            "DINO's norms are swapped",
            '("layer_norm1", "layernorm_before")',
            '("layer_norm1", "layernorm_after")',
        ),
    ),
    ("extras/encoders", "extras/vision extras/evaluate"): (
        ("bilinear", "Image.BICUBIC", "Image.BILINEAR"),
        (
            "the longer side is rounded",
            "int(resize * height / width)",
            "round(resize * height / width)",
        ),
        ("width is rounded", "int(resize * width / height)", "round(resize * width / height)"),
        ("the crop is off the centre", "(size[0] - crop) // 2,", "(size[0] - crop + 1) // 2,"),
        (
            "rescaled in float32",
            "pixels.astype(np.float64) * (1 / 255)",
            "pixels.astype(np.float32) * np.float32(1 / 255)",
        ),
        ("normalised in float64", "np.array(mean, dtype=np.float32)", "np.array(mean)"),
        ("not normalised", "(pixels - np.array(mean", "(pixels - 0 * np.array(mean"),
        ("DINO with CLIP's statistics", '*STATISTICS["dino"])', '*STATISTICS["clip"])'),
        ("DINO is resized to its crop", "image_size * 256 / 224", "image_size"),
        (
            "features are not of length 1",
            "F.normalize(torch.cat(features), dim=-1)",
            "torch.cat(features)",
        ),
        ("texts are not of length 1", "F.normalize(pooled.cpu(), dim=-1)", "pooled.cpu()"),
        (
            "a tensor left over is taken",
            "(weights, assign=True)",
            "(weights, strict=False, assign=True)",
        ),
        ("any model is taken for DINO", "not in kinds:", "is None:"),
        ("the revision is dropped", 'find(name, [""], revision=revision)', 'find(name, [""])'),
    ),
    ("extras/evaluate", "extras/evaluate"): (
        (
            "cosine to the mean photo",
            "(generated @ photos.T).mean(1)",
            "generated @ photos.mean(0) / photos.mean(0).norm()",
        ),
        ("pairs of all prompts", "if prompts[i] and prompts[i] == prompts[j]:", "if True:"),
        ("a pair is a similarity", "distances.append(1 - float(", "distances.append(float("),
        ("the token stays in CLIP-T", 'word.sub(" ", text)', "text"),
        ("the token within a word", r'rf"(?<!\w){re.escape(token)}(?!\w)"', "re.escape(token)"),
        ("leakage of the average photo", "(ours @ theirs.T).amax(1)", "(ours @ theirs.T).mean(1)"),
        ("the subject without its mask", "corner, mask.crop(box))", "corner)"),
        (
            "the background is the subject",
            'Image.composite(Image.new("RGB", image.size, MEAN_COLOUR), image, mask)',
            'Image.composite(image, Image.new("RGB", image.size, MEAN_COLOUR), mask)',
        ),
        ("preprocessing cuts the subject", "* 256 / 224)", ")"),
        (
            "PRES is of one class image",
            'summary["PRES"] = float(fidelity(features,',
            'summary["PRES"] = float(fidelity(features[:1],',
        ),
        (
            "scores go among the images",
            "if Path(args.out).resolve() == Path(args.generated).resolve():",
            "if False:",
        ),
        ("too few prompts", "if len(lines) != len(paths):", "if False:"),
    ),
    ("extras/validation", "extras/validation"): (
        (
            "the best step by the subject alone",
            "sum(self.scores[step].values())",
            'self.scores[step]["subject"]',
        ),
        ("the best step is the worst", "return max(self.scores", "return min(self.scores"),
        (
            "class and subject are swapped",
            "self.encode([subject]), self.photos",
            "self.encode([class_]), self.photos",
        ),
        (
            "the class beside itself",
            "self.encode([class_]), self.encode([base])",
            "self.encode([class_]), self.encode([class_])",
        ),
        ("the base image is replaced", "if step == 0:", "if True:"),
        ("scores of before are lost", 'if row.get("subject") is not None:', "if False:"),
    ),
    ("methods/outputs", "extras/validation"): (
        (
            "scores go to a row of their own",
            'if not self.rows or self.rows[-1]["step"] != step:',
            "if True:",
        ),
        ("rows that are computed again stay", 'if int(row["step"]) <= step and', "if"),
    ),
    ("extras/benchmark", "extras/benchmark"): (
        ("a dog is an object", 'LIVE = ("cat", "dog")', 'LIVE = ("cat",)'),
        (
            "the scene has the token",
            'template.format("", class_word)',
            "template.format(token, class_word)",
        ),
        ("images of other settings are kept", "png.check(job.path, facts_of(job, args))", "pass"),
        ("what is there is generated again", "if job.path.exists():", "if False:"),
        ("subjects without a folder", "if (folder / name).is_dir()", "if True"),
        (
            "a failed insertion counts as done",
            "job.scene, **options), False",
            "job.scene, **options), True",
        ),
        ("one seed for all", "for seed in range(seeds):", "for seed in range(seeds)[:1]:"),
    ),
}
