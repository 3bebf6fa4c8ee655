"""What there is in the toy world, and what of it no training has seen."""

CLASSES = {
    "dog": ["face", "puppy", "guide", "shepherd", "poodle"],
    "cat": ["face", "tabby", "black"],
    "bear": ["brown", "polar", "teddy", "panda"],
    "bird": ["crow", "cardinal", "parrot", "duck", "flamingo", "owl"],
    "horse": ["bay", "racer", "carousel", "unicorn"],
    "fish": ["blue", "tropical", "puffer", "shark"],
    "car": ["hatchback", "jeep", "police", "racing", "taxi"],
    "house": ["cottage", "hut", "church", "school", "pagoda"],
    "flower": ["tulip", "rose", "hibiscus", "daisy", "hyacinth", "sunflower"],
    "ball": ["basketball", "football", "baseball", "volleyball", "eight", "soccer"],
    "shoe": ["leather", "sneaker", "heel", "boot", "hiking", "flat"],
    "hat": ["top", "cap", "helmet", "army", "straw"],
    "bag": ["backpack", "handbag", "briefcase", "suitcase", "purse"],
    "book": ["red", "green", "blue", "notebook", "confetti", "open"],
    "cup": ["coffee", "tea", "bubble", "soda"],
    "cake": ["slice", "birthday", "pudding", "pancakes", "cupcake"],
}
for word, names in CLASSES.items():  # a sprite is sprites/<class>-<instance>.webp
    CLASSES[word] = [f"{word}-{name}" for name in names]
BACKGROUNDS = {  # the phrases of a caption; the first is the commonest
    "beach": ("on a beach", "at the seaside", "on a sandy beach by the sea"),
    "grass": ("on the grass", "in a green field", "in a field of grass"),
    "snow": ("in the snow", "on a snowy day", "on the snow"),
    "desert": ("in the desert", "in a hot desert", "on a sand dune"),
    "forest": ("in a forest", "in the woods", "among the trees"),
    "night": ("at night", "under the stars", "under a night sky"),
    "wall": ("in front of a brick wall", "next to a brick wall", "on the pavement by a wall"),
    "room": ("in a room", "on a wooden floor", "indoors"),
}
HELD_OUT_INSTANCES = (
    "dog-poodle",
    "bear-panda",
    "bird-owl",
    "car-taxi",
    "flower-sunflower",
    "ball-soccer",
    "hat-straw",
    "cake-cupcake",
)
HELD_OUT_PAIRS = (  # a tenth of the 128: a class loses one place, a place two classes
    ("dog", "desert"),
    ("cat", "beach"),
    ("bear", "room"),
    ("bird", "night"),
    ("horse", "snow"),
    ("fish", "forest"),
    ("car", "grass"),
    ("flower", "wall"),
    ("ball", "night"),
    ("hat", "snow"),
    ("bag", "desert"),
    ("book", "beach"),
    ("cup", "forest"),
)
HELD_OUT_STYLES = ("pencil", "pixel")
COLOURS = {  # what an instance is called after, where it has a colour
    "red": "bird-cardinal car-hatchback flower-rose shoe-heel shoe-boot hat-helmet book-red",
    "blue": "fish-blue car-jeep shoe-flat hat-cap bag-suitcase book-blue",
    "green": "hat-army book-green",
    "brown": "bear-brown horse-bay ball-football shoe-leather bag-briefcase",
    "yellow": "cat-face book-notebook",
    "white": "bear-polar flower-daisy ball-baseball ball-volleyball cup-tea",
    "black": "cat-black ball-eight hat-top",
    "pink": "bird-flamingo flower-tulip flower-hibiscus bag-backpack bag-purse",
    "orange": "ball-basketball",
}
COLOUR_OF = {}
for colour, instances in COLOURS.items():
    COLOUR_OF |= dict.fromkeys(instances.split(), colour)
