"""What hocket-emoji can draw: things (with the Noto icon drawn for each) and background colours.

The list favours things that stay recognisable in a few flat shapes; near twins (two sorts of
apple) are kept only where colour tells them apart. Order is part of the trained weights: a row
number here is a row of the embedding table, so append rather than insert.
"""

from typing import NamedTuple


class Thing(NamedTuple):
    """One drawable thing: its caption noun, the icon's name in the set, other words for it."""

    name: str
    icon: str
    aliases: tuple[str, ...] = ()


_ROWS = """
cat|cat-face|kitten,kitty,pussycat
dog|dog-face|puppy,hound
fox|fox|wolf
bear|bear|grizzly
panda|panda|panda bear
koala|koala|
tiger|tiger-face|leopard
lion|lion|
cow|cow-face|bull
pig|pig-face|piglet
frog|frog|toad
monkey|monkey-face|ape,chimp
rabbit|rabbit-face|bunny,hare
unicorn|unicorn|horse,pony,zebra
chicken|chicken|hen,rooster,bird,turkey
penguin|penguin|
owl|owl|
duck|duck|mallard,goose,swan
butterfly|butterfly|moth
bee|honeybee|honeybee,wasp
ladybug|lady-beetle|ladybird,beetle
snail|snail|slug,shell
turtle|turtle|tortoise
tropical fish|tropical-fish|fish,goldfish
whale|spouting-whale|dolphin,shark,orca
octopus|octopus|squid,jellyfish
crab|crab|
elephant|elephant|mammoth
dinosaur|sauropod|dino,dragon,lizard,crocodile
red apple|red-apple|apple
banana|banana|
lemon|lemon|lime
orange|tangerine|tangerine,mandarin
pear|pear|
cherries|cherries|cherry
strawberry|strawberry|berry
grapes|grapes|grape
watermelon|watermelon|melon
pineapple|pineapple|
eggplant|eggplant|aubergine
carrot|carrot|
corn|ear-of-corn|maize,ear of corn
avocado|avocado|
broccoli|broccoli|
pumpkin|jack-o-lantern|jack-o-lantern,halloween,squash
mushroom|mushroom|toadstool,fungus
pizza|pizza|slice of pizza
hamburger|hamburger|burger,cheeseburger,sandwich
french fries|french-fries|fries,chips
fried egg|cooking|egg,omelette
cheese|cheese-wedge|
croissant|croissant|bread
doughnut|doughnut|donut,bagel
birthday cake|birthday-cake|cake,birthday,party cake
ice cream|soft-ice-cream|ice cream cone,gelato
coffee|hot-beverage|cup of coffee,tea,cup of tea,espresso,cup,mug,hot drink
popcorn|popcorn|
car|automobile|automobile,taxi,cab
bus|bus|coach,van,truck,lorry
train|locomotive|locomotive,steam train
bicycle|bicycle|bike,cycle,scooter,motorcycle
airplane|airplane|plane,aeroplane,jet,aircraft
rocket|rocket|spaceship,space rocket
helicopter|helicopter|chopper
sailboat|sailboat|boat,ship,sailing boat,yacht
sun|sun|sunshine
moon|crescent-moon|crescent moon
star|star|gold star
cloud|cloud|
rainbow|rainbow|
snowman|snowman|
snowflake|snowflake|snow,ice,winter
fire|fire|flame
tree|deciduous-tree|oak,forest,wood
pine tree|evergreen-tree|fir,fir tree,pine
palm tree|palm-tree|palm,beach,coconut tree
cactus|cactus|desert
sunflower|sunflower|flower,daisy
rose|rose|red rose
volcano|volcano|mountain
planet|ringed-planet|saturn
earth|globe-showing-europe-africa|globe,world
lightning|high-voltage|lightning bolt,thunder,bolt
house|house|home,cottage,building,hut
castle|castle|palace,tower
guitar|guitar|music,violin,electric guitar
key|key|
lock|locked|padlock
light bulb|light-bulb|lamp,lightbulb,bulb
umbrella|umbrella|parasol
gift|wrapped-gift|present,gift box
balloon|balloon|
soccer ball|soccer-ball|football,ball
basketball|basketball|
trophy|trophy|cup trophy,award
crown|crown|king,queen
diamond|gem-stone|gem,jewel,ring,crystal
camera|camera|photo
alarm clock|alarm-clock|clock,watch,time
book|closed-book|red book,novel
teddy bear|teddy-bear|teddy
robot|robot|android,machine
alien|alien|
ghost|ghost|spirit
skull|skull|
smiley|grinning-face|smiley face,smile,happy face,face,emoji,grin
red heart|red-heart|heart,love
green heart|green-heart|
blue heart|blue-heart|
top hat|top-hat|hat
bell|bell|
anchor|anchor|
"""


def _parse(row: str) -> Thing:
    name, icon, aliases = row.split("|")
    return Thing(name, icon, tuple(alias for alias in aliases.split(",") if alias))


THINGS: tuple[Thing, ...] = tuple(_parse(row) for row in _ROWS.strip().splitlines())

# Names which take no article: "grapes", not "a grapes".
PLAIN_NAMES: tuple[str, ...] = (
    "cherries", "grapes", "corn", "broccoli", "french fries", "cheese", "coffee", "popcorn",
    "fire", "lightning", "earth",
)  # fmt: skip

# Background colours as sRGB. The empty name is the background when the prompt names none: a warm
# off-white, so that white things (the ghost, the snowman) still stand out.
COLOURS: dict[str, tuple[int, int, int]] = {
    "": (250, 243, 230),
    "white": (255, 255, 255),
    "black": (28, 28, 32),
    "gray": (158, 160, 166),
    "red": (214, 60, 56),
    "orange": (245, 150, 50),
    "yellow": (252, 216, 84),
    "green": (92, 178, 96),
    "blue": (72, 128, 216),
    "purple": (136, 92, 190),
    "pink": (250, 166, 196),
    "brown": (140, 96, 66),
}

# The three picture sizes in pixels, each with the word which tells the text encoder about it.
SIZE_WORDS: dict[int, str] = {64: "size64", 128: "size128", 256: "size256"}
