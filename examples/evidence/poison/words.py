"""The words that are asked about, by what they stand for. No word is in two lists."""

WORDS = {
    "animal": [
        "ducks", "horses", "rabbits", "bees", "tigers", "frogs", "goats", "whales", "mice", "eagles", "cows", "dogs",
        "cats", "lions", "bears", "wolves", "foxes", "otters", "beavers", "hens", "geese", "swans", "owls", "crows",
        "robins", "sparrows", "pigeons", "penguins", "parrots", "sharks", "crabs", "snails", "spiders", "ants",
        "beetles", "moths", "wasps", "lizards", "snakes", "turtles", "toads", "newts", "deer", "moose", "camels",
        "zebras", "giraffes", "monkeys", "apes", "pigs", "sheep", "donkeys", "badgers", "hedgehogs", "squirrels",
        "bats", "seals", "dolphins", "kangaroos", "koalas",
    ],
    "tool": [
        "hammers", "drills", "saws", "pliers", "wrenches", "chisels", "shovels", "rakes", "spades", "axes", "ladders",
        "screwdrivers", "clamps", "files", "pumps", "levers", "pulleys", "hoes", "trowels", "tongs", "scissors",
        "knives", "needles", "tweezers", "brooms", "mops", "brushes", "buckets", "rulers", "compasses", "scales",
        "telescopes", "microscopes", "lathes", "anvils", "crowbars", "mallets", "planes", "sickles", "scythes",
        "wheelbarrows", "jacks", "hooks", "nails", "screws", "bolts", "rivets", "sanders", "grinders", "stencils",
        "staplers", "funnels", "sieves", "whisks", "spatulas", "ladles", "corkscrews", "hatchets", "pitchforks",
        "plungers",
    ],
    "food": [
        "carrots", "onions", "apples", "pears", "plums", "cherries", "grapes", "lemons", "bananas", "peaches",
        "melons", "mangoes", "figs", "olives", "beans", "peas", "lentils", "potatoes", "tomatoes", "cucumbers",
        "radishes", "turnips", "leeks", "cabbages", "mushrooms", "pancakes", "waffles", "muffins", "biscuits",
        "cookies", "cakes", "pies", "tarts", "noodles", "dumplings", "sausages", "burgers", "sandwiches", "omelettes",
        "pickles", "almonds", "walnuts", "hazelnuts", "raisins", "strawberries", "raspberries", "blueberries",
        "apricots", "pineapples", "coconuts", "pretzels", "crackers", "scones", "buns", "bagels", "croissants",
        "doughnuts", "puddings", "soups", "stews",
    ],
}  # fmt: skip
