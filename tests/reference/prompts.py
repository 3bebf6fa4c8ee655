"""Prompts for the tokenizers, at least one for each rule; tokens.py makes the reference ids of them.

No character is newer than Unicode 10 (2017), so the version of the tables that a Python has does not matter.
"""

ORDINARY = [
    "a photo of a dog",
    "a photo of a sks dog on a beach",
    "A Photo Of A Dog",
    "A PHOTO OF A DOG",
    "a red apple on a wooden table, soft light, 35mm film",
    "an astronaut riding a horse, digital art, trending on artstation",
    "portrait of an old fisherman with a grey beard, oil on canvas, Rembrandt",
    "isometric view of a tiny cottage; low-poly, pastel colours",
    "a cat and a dog and a cat and a dog",
    "caterpillar", "a caterpillar next to a cat", "cats", "concatenate",
    "golden retriever", "a golden retriever puppy", "goldenretriever", "golden-retriever",
    "iklan dog", "ohwx man", "zwx vase", "a <my-dog> in the snow", "<s0><s1> dog",
    "supercalifragilisticexpialidocious", "antidisestablishmentarianism",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "the quick brown fox jumps over the lazy dog",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et dolore magna aliqua",
    "masterpiece, best quality, ultra-detailed, 8k uhd, dslr, soft lighting, high quality, film grain, Fujifilm XT3",
    "blurry, lowres, bad anatomy, extra fingers, watermark, jpeg artifacts",
    "i", "a", "I", "x y z", "hello world", "HelloWorld", "camelCaseWord", "eBay", "iPhone15Pro", "McDonald's",
]

PUNCTUATION = [
    "dog.", "dog,", "dog, cat", "dog,cat", "dog ,cat", "dog;cat:bird", "dog/cat", "dog\\cat", "dog|cat", "dog--cat", "dog - cat",
    "a dog...", "a dog . . .", "a dog…", "(a dog)", "[a dog]", "{a dog}", "((a dog))", "(((masterpiece)))", "<a dog>", "\"a dog\"",
    "“a dog”", "‘a dog’", "«a dog»", "„a dog“", "a dog?", "a dog?!", "¿a dog?", "#dog", "@dog", "$5 dog", "50% dog", "dog & cat",
    "dog+cat", "dog=cat", "dog*cat", "dog^2", "~dog~", "`dog`", "dog™", "dog©®", "§ 5", "°C", "20°", "€20", "£20", "¥20", "₿",
    "-", "--", "---", "–", "—", "a–b", "a—b", ".", ",", ",,,,", ", , ,", ":-)", ";)", "^_^", "¯\\_(ツ)_/¯", "->", "=>", "→", "a→b", "←↑↓",
    "+-*/=", "!@#$%^&*()_+-=[]{}|;':\",./<>?", "http://example.com/a?b=c&d=e#f", "user@example.com", "C:\\dogs\\rex.png", "a.b.c",
    "mid\u00b7dot", "bul•let", "★ star ☆", "♥", "☃", "½", "±1", "×", "a×b", "∑∫√∞≠≤≥", "≮", "<\u0338", "=\u0338", ">\u0338",
]

WEIGHTS = [
    "(word:1.2)", "a (red:1.3) dog", "a ((red)) dog", "a [red] dog", "a [red:blue:0.5] dog", "(dog:-1)", "<lora:my-dog:0.8>",
    "dog AND cat", "dog BREAK cat", "a (dog:1.2", "a dog:1.2)", "\\(dog\\)",
]

DIGITS = [
    "1", "12", "123", "1234567890", "8k", "4K", "1girl", "2 dogs", "dog2", "dog 2", "dog42cat", "r2d2", "R2-D2", "3.14", "1,000",
    "1/2", "2:3", "16:9", "f/1.8", "1920x1080", "2024-05-17", "007", "x²", "m³", "H₂O", "¹²³", "Ⅷ", "ⅷ", "Henry Ⅷ", "٣", "٠١٢٣", "۴۵",
    "१२३", "๑๒๓", "１２３", "一二三", "①②③", "⑴", "⓪", "¾ cup", "㊀", "𝟘𝟙𝟚", "௧", "〇", "〡〢", "ↈ",
]

CONTRACTIONS = [
    "dog's", "dog 's", "dogs'", "dog'S", "DOG'S", "it's", "don't", "DON'T", "we're", "WE'RE", "I've", "I'm", "she'll", "he'd", "y'all",
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'sample", "'tis", "'reach", "'dog'", "'", "''", "'''", "''s", "\"'s", "-'s", "_'s", "x''s",
    "rock'n'roll", "o'clock", "d'Artagnan", "l'été", "'S", "'s's", "'s 't", "dog’s", "don’t", "dog`s", "dog´s", "dogʼs", "'l", "'v", "'r",
    "can't've", "1's", "80's", "'80s", "²'s", "é's", "日's", "!'s", "'s!", "'!s",
]

ACCENTS = [
    "café", "cafe\u0301", "CAFÉ", "CAFE\u0301", "naïve", "nai\u0308ve", "Ångström", "A\u030angstro\u0308m", "\u212bngstro\u0308m", "façade", "piñata",
    "crème brûlée", "Dvořák", "Łódź", "Škoda", "smörgåsbord", "a\u0301\u0302", "a\u0302\u0301", "a\u0323\u0307", "a\u0307\u0323", "e\u0301\u0301\u0301",
    "q\u0301", "\u0301", " \u0301", "a \u0301b", "Ǆ", "ǅ", "ǆ", "ﬁnd", "eﬃcient", "ﬀ", "ŉ", "ß", "ẞ", "Straße", "STRASSE", "STRAẞE", "Æsir", "œuvre",
    "Ø", "Þórr", "đ", "ı", "İ", "İstanbul", "DİYARBAKIR", "ısı", "i\u0307", "I\u0307", "Kelvin \u212a", "Ohm \u2126", "ſ", "ℌ", "ª º", "ǰ", "ΐ", "ᾳ", "ᾼ",
    "Việt Nam", "Vie\u0323\u0302t Nam", "z\u0335a\u0321l\u0322g\u0337o\u0336", "A\u030a\u0301",
]

GREEK_CYRILLIC = [
    "ΟΔΟΣ", "οδος", "οδός", "ΟΔΟΣ ΣΟΦΟΣ", "Σ", "ΣΣ", "ς", "σ", "ΑΣ'", "ΑΣ.", "Α.Σ", "αΣ", "Σα", "ΌΣΑΣ", "Ἀθῆναι", "Ὀδυσσεύς", "ΟΔΥΣΣΕΎΣ", "άά", "α\u0301",
    "собака", "СОБАКА", "Собака на пляже", "Ёлка", "Е\u0308лка", "Йод", "И\u0306од", "ЉУБАВ", "Ꙁ", "Ѣ", "ӏ", "Ӏ", "ᲀ", "ԱՐԵՎ", "արև", "և", "საქართველო", "Ⴀ",
]

SCRIPTS = [
    "一只狗在海滩上", "狗", "犬の写真", "いぬ", "イヌ", "ｲﾇ", "カ\u3099", "ガ", "が", "か\u3099", "강아지", "\u1100\u1161", "\u1112\u1161\u11ab", "각", "한국어 dog",
    "dog狗dog", "日本、東京。", "「犬」", "ー", "々", "豈", "\uf900", "〜", "㍿", "㎡", "Ｄｏｇ　ｃａｔ", "كلب على الشاطئ", "كَلْب", "ﷺ", "ﻻ", "آ", "\u0627\u0653", "پارسی", "می\u200cخواهم",
    "כלב על החוף", "כֶּלֶב", "\u05e9\u05c1", "\ufb2a", "\ufb1d", "หมา", "สุนัขบนชายหาด", "น้ำ", "हिन्दी", "कुत्ता", "क्\u200dष", "\u0915\u093c", "\u0958", "বাংলা", "ো", "\u09c7\u09be", "தமிழ்",
    "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "ਪੰਜਾਬੀ", "සිංහල", "ຫມາ", "མཁྱེན", "ခွေး", "ဦ", "អ្នក", "ᠮᠣᠩᠭᠣᠯ", "ውሻ", "ᏣᎳᎩ", "Ꭰ", "ᐃᓄᒃᑎᑐᑦ", "ᚱᚢᚾ", "ⰀⰁ", "ⴰⵣⵓⵍ", "ꦗꦮ",
    "𐐀𐐁", "𝔇𝔬𝔤", "𝒟ℴℊ", "𝗗𝗼𝗴", "Ⓓⓞⓖ", "𐍈", "𠀀", "𪚥", "𐎠𐎼", "𓃡", "𝄞", "\U0001d15e", "🄰", "🅓", "🇩🇪",
]

EMOJI = [
    "😀", "dog 😀", "dog😀", "😀😀😀", "😀 😀", "👍", "👍🏽", "👩\u200d🔬", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "❤", "❤\ufe0f", "☀\ufe0f", "1\ufe0f\u20e3", "#\ufe0f\u20e3",
    "🐕", "🐶🐱", "a 🐕's tail", "🔥🔥🔥 epic", "✨sparkle✨", "🎉!", "©\ufe0f", "🇫🇷🇯🇵", "😀!😀", "🦄", "👁\u200d🗨",
]

INVISIBLE = [
    "a\u200bb", "a\u200cb", "a\u200db", "a\u2060b", "\ufeffdog", "dog\ufeff", "a\u00adb", "\u200bdog\u200b", "\u200edog\u200f", "\u202edog\u202c", "a\u180eb", "a\u034fb", "a\u115fb",
    "a\u3164b", "dog\ufe0e", "\ufffd", "a\ufffeb", "\ue000", "\U000f0000", "a\x00b", "a\x01b", "\x07", "a\x08b", "a\x1bb", "a\x7fb", "a\x80b", "a\x84b", "a\x86b", "a\x9fb", "\x1c", "\x1c\x1d",
]

# Every white-space code point, and four that only Python counts as such (\x1c to \x1f): between letters, doubled, at both ends.
SPACE = [f"a{space}dog{space}{space}b{space}" for space in map(chr, (
    9, 10, 11, 12, 13, 0x1c, 0x1d, 0x1e, 0x1f, 0x20, 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028, 0x2029, 0x202f, 0x205f, 0x3000))]
SPACE += ["", " ", "  ", "\n", "\t\n ", "\u3000", "\x85", " a  dog ", "\r\na\r\ndog\r\n", "a \t\n dog", "a \x1c dog", "' s", "dog\n's", "1 2", "1\u00a02", ". .", ".\u2009."]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPECIAL = [
    EOS, BOS, f"a {EOS} dog", f"a{EOS}dog", f"{BOS}a dog{EOS}", f"a {EOS}{EOS} dog", f"  {EOS}  ", f"a {BOS} {BOS}", EOS.upper(), BOS.upper(), f"a {EOS.upper()} dog",
    f"a{EOS.upper()}!!", f"a{EOS.upper()}>>", f"<{EOS.upper()}", f"*{EOS.upper()}*", f"{EOS.upper()}'s", f"{EOS}'s", f"{EOS}!", f"!{EOS}!", f"{BOS.upper()}!!", "<|EndOfText|> dog",
    "<|StartOfText|> dog", "<|endoftext|", "|endoftext|>", "<| endoftext |>", "<|endoftext|>\u0338", "<|ENDOFTEXT|>\u0338", "<<|endoftext|>>", "<|endofte\u0301xt|>", "<|endoftext\u200b|>",
    "<|pad|>", "<pad>", "<unk>", "[CLS] dog [SEP]", "</w>", "dog</w>", "a</w>b", "Ġdog", "âĢĻ", "#version: 0.2", "<|endoftext|><|startoftext|>", "<|ＥＮＤＯＦＴＥＸＴ|>",
]

EXCLAMATION = [
    "!", "!!", "!!!", "! ! !", "a!", "!a", "a!b", "a ! b", "wow!!", "wow!?", "wow?!", "(!)", "!1", "1!", "a!!b", "a!.b", "a.!b", "...!...", "'!'", "don't!", "don!'t", "!\u0301", "é!é",
    "e!\u0301", "！", "¡dog!", "‼", "dog!\n", "\n!\n", "  !  ", "ΑΣ!", "Σ!Σ", "a" + "!" * 80, "!" * 75, "!" * 76,
]

OTHER = [
    "my_dog", "_", "__init__", "a_1", "snake_case_word", "&amp;", "dog &amp; cat", "&lt;b&gt;", "&#39;", "&quot;dog&quot;", "<b>dog</b>", "%20", "\\n", "\\u0041", "dog\\'s", "â€™", "cafÃ©",
    "{dog|cat}", "__dog__", "$dog", "`rm -rf`", "SELECT * FROM dogs;", "a\ndog\non\na\nbeach", "- dog\n- cat",
]

# Up to the limit and past it; a word of four pieces across it; long words, and one long run of each sort.
LONG = [
    "dog " * 74, "dog " * 75, "dog " * 76, "dog " * 77, "dog " * 200, "dog " * 74 + "caterpillaresque thing", "dog " * 72 + "supercalifragilisticexpialidocious", "dog, " * 38,
    "a red dog on a green meadow under a blue sky, " * 20, "x" * 100, "dog" * 60, "abcdefghij" * 30, "." * 100, "0123456789" * 10, "é" * 100, "狗" * 100, "😀" * 60, "'s" * 80,
    "a " * 73 + "!", "a " * 74 + "!", "a " * 75 + "!", "a " * 74 + EOS, "a " * 75 + EOS, "Σ" * 80, "aaaaaaa", "ababababab", "nnnnn nnnn nnn", "ahahahahaha", "zzzzzzzzzzzzzzzzzz", "===" * 30,
]

PROMPTS = [*ORDINARY, *PUNCTUATION, *WEIGHTS, *DIGITS, *CONTRACTIONS, *ACCENTS, *GREEK_CYRILLIC, *SCRIPTS, *EMOJI, *INVISIBLE, *SPACE, *SPECIAL, *EXCLAMATION, *OTHER, *LONG]
