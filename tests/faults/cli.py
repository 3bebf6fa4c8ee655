"""Faults of the command line: flags, files and folders, sample.py and insert.py.

(module in alchemy/, test files): (what it is, the exact old text, the new text), ...
"""

FAULTS = {
    ("cli", "cli/flags"): (
        (
            "WIDTHxHEIGHT is read as HEIGHTxWIDTH",
            "    return height, width\n",
            "    return width, height\n",
        ),
        ("any size is taken", "<= MAX_SIDE and 1 <= height <= MAX_SIDE", "and 1 <= height"),
        ("low itself is above low", "value <= low if above", "value < low if above"),
        ("NaN is a number", " or value != value", ""),
        ("a scale may be infinite", "if not abs(scale) <= 1e6:", "if False:"),
        ("other tools' flags give no hint", "other_tools.flag_here(name, known)", '""'),
        ("other tools' samplers give no hint", "if not fits:", "if True:"),
        ("only the first unknown flag is named", "flags[:MAX_HINTS]", "flags[:1]"),
        (
            "a switch takes any JSON",
            "action.nargs == 0 and type(value) is bool",
            "action.nargs == 0",
        ),
        ("a repeated flag takes any JSON", "is_list and not isinstance(value, list)", "False"),
        ("a text is a number", "if result != expected or", "if"),
        ("settings are not checked", "p.from_json(name, saved[name])", "saved[name]"),
        ("deep JSON is a fault", "(ValueError, RecursionError)", "ValueError"),
        (
            "flags do not override --config",
            "args = self.parse_args(argv)\n        self",
            "args = given\n        self",
        ),
        ("a flag is added to the list of --config", "getattr(given, action.dest):", "False:"),
        ("--seed -1 is a seed", "if args.seed == -1:", "if False:"),
        (
            "--eta is ignored by dpmpp_2m",
            'if args.eta and args.sampler == "dpmpp_2m":',
            "if False:",
        ),
        ("--negative-prompt is ignored", "and args.guidance == 1", "and False"),
        ("the default LoRA is the bundled one", "TRAINED_LORA if TRAINED_LORA.exists() else ", ""),
        ("an unexpected error is silent", "(unexpected; --traceback shows where)", ""),
        ("a fault shows its traceback", '"--traceback" in sys.argv or ', "True or "),
    ),
    ("cli", "cli/outputs"): (
        ("folders of a failed run stay", "stack.callback(remove_empty, missing)", "pass"),
        ("folders are not locked", "if lock:\n            stack", "if False:\n            stack"),
        ("a long name fails after the work", "error.errno == errno.ENAMETOOLONG", "False"),
        ("control characters are printed raw", 'c.encode("unicode_escape").decode()', "c"),
        ("long messages are printed whole", "if len(text) > MAX_MESSAGE:", "if False:"),
        ("stdout fails on what it cannot encode", 'errors="backslashreplace"', 'errors="strict"'),
        ("a closed stderr is an error", "if sys.stderr is None:", "if False:"),
        ("Ctrl-C ends with 2", "sys.exit(130)", "sys.exit(2)"),
        ("out of memory is a fault", "for sign in OUT_OF_MEMORY", "for sign in ()"),
        ("no advice when out of memory", 'MemoryError(suggest() or "")', 'MemoryError("")'),
    ),
    ("files", "cli/outputs"): (
        ("a file is written in place", "new = Path(folder) / path.name", "new = path"),
        ("a file is replaced by a new one", "os.link(new, path)", "os.replace(new, path)"),
        ("without links a file is replaced", "os.O_CREAT | os.O_EXCL", "os.O_CREAT"),
        ("the lock is not taken", "if not try_lock(file):", "if False:"),
        ("a removed lock file is a lock", "if same_file(file, path):", "if True:"),
        ("the lock file stays", "            path.unlink()\n", "            pass\n"),
        ("nothing is synced", "os.fsync(file.fileno())", "pass"),
    ),
    ("extras/image_sets", "cli/image_sets"): (
        (
            "every image is generated again",
            "if not job.path.exists():\n        return",
            "if True:\n        return",
        ),
        ("other settings are mixed in", "png.check(job.path", "dict and (job.path"),
        ("the contents of a LoRA do not count", '"fp8_base", "digests")', '"fp8_base")'),
        ("blank lines are prompts", "if line.strip() else 0)", ")"),
        ("other images are forgotten", "if others:", "if False:"),
        (
            "missing images are listed",
            "if job.path.exists():\n            row",
            "if True:\n            row",
        ),
    ),
    ("extras/image_sets", "cli/sample"): (
        ("changed files are not named", "then.get(name, digest) != digest", "False"),
        (
            "--like opens what the image names",
            '    raise ValueError(f"it was made with',
            '    return {name: wanted}\n    raise ValueError(f"it was made with',
        ),
        (
            "--like does not check",
            "values[name] = p.from_json(name, metadata[name])",
            "values[name] = metadata[name]",
        ),
        ("--like takes a seed of -1", 'or values.get("seed", 0) < 0', ""),
        ("--like takes any image", 'or metadata.get("script") != "sample.py"', ""),
        ("--like forgets the scales", "image_scale if scale is None else scale", "scale or 1.0"),
    ),
    ("cli", "cli/sample"): (
        ("the first step is typical", "/ (self.count - 1)", "/ self.count"),
        ("the time is logged again and again", "self.logged = True", "pass"),
        ("the previews take no time", "(self.total - self.count) + self.extra", "self.total"),
    ),
    ("../sample", "cli/sample cli/image_sets"): (
        (
            "images replace each other",
            "files.replace if args.prompts else files.create",
            "files.replace",
        ),
        (
            "strength has no effect",
            "                strength=strength,\n                progress",
            "                strength=1.0,\n                progress",
        ),
        (
            "the negative prompt is lost",
            "                unconditional,\n                job.seed",
            "            None,\n                job.seed",
        ),
        (
            "every image has the first seed",
            "            job.seed,\n                args.size",
            "            args.seed,\n                args.size",
        ),
        ("the metadata has the first seed", '"seed": job.seed}', '"seed": args.seed}'),
        (
            "a stopped set has no list",
            "image_sets.write_list(path.parent, jobs)  # of use",
            "pass  # of use",
        ),
        (
            "an image tells where it was written",
            "cli.metadata(args) | options",
            "cli.settings(args) | options",
        ),
    ),
    ("../insert", "cli/insert"): (
        ("the token stays in the scene", "args.prompt = cleaned", "pass"),
        ("the LoRA's token is not read", "if value and not given:", "if False:"),
        (
            "no warning of another token",
            "elif value and given.lower() != value.lower()",
            "elif False",
        ),
        ("zero is a missing value", "if value is None else value", "if not value else value"),
        ("the seed is not passed", "            seed=args.seed,\n", ""),
    ),
}
