"""The text that the demo embeds: eight topics of five sentences, and one query to each topic.

Each query has one best answer among the sentences.
"""

SENTENCES = (
    # cooking
    "Let the bread dough rise in a warm place until it has doubled in size.",
    "Salt the aubergine slices and leave them for half an hour to draw out the bitterness.",
    "A pinch of baking soda keeps green beans bright while they boil.",
    "Rest a roast under foil before carving, so that the juices stay in the meat.",
    "Caramel burns quickly, so take the pan off the heat as soon as it turns amber.",
    # astronomy
    "Jupiter is the largest planet of the solar system and has dozens of moons.",
    "A total solar eclipse happens when the Moon completely covers the disc of the Sun.",
    "Light from the nearest star beyond the Sun travels more than four years to reach us.",
    "Astronomers find distant planets by the tiny dimming of a star as they pass in front of it.",
    "Comets grow bright tails when sunlight turns their ice into gas.",
    # personal finance
    "Paying only the minimum on a credit card makes the debt grow through interest.",
    "An emergency fund should cover three to six months of living expenses.",
    "Index funds spread the money over hundreds of companies at a low cost.",
    "A fixed-rate mortgage keeps the monthly payment the same for many years.",
    "Keep your receipts, because some costs of working from home can be deducted from tax.",
    # gardening
    "Water tomato plants at the root in the morning to keep the leaves dry.",
    "Prune apple trees in late winter, while they are dormant.",
    "Coffee grounds and vegetable peel turn into rich compost within a few months.",
    "Plant tulip bulbs in autumn, about three times as deep as they are tall.",
    "Ladybirds eat aphids and so protect roses without any chemicals.",
    # computing
    "A database index makes searches fast but slows down every insert.",
    "The garbage collector frees memory that the program can no longer reach.",
    "Use a password manager to have a different long password for each website.",
    "Git keeps the whole history of a project, so any old version can be restored.",
    "Quantization stores the weights of a neural network in eight bits to save memory.",
    # health
    "Adults should sleep seven to nine hours a night to stay healthy.",
    "Wash your hands with soap for twenty seconds to stop the spread of germs.",
    "Regular brisk walking lowers blood pressure and strengthens the heart.",
    "Antibiotics do not help against a cold, because colds are caused by viruses.",
    "Cool a burn under running water for at least ten minutes.",
    # travel
    "Trains between Paris and Lyon take about two hours and leave almost hourly.",
    "Book the ferry to the islands early, since it is full in the summer months.",
    "Your passport must be valid for six months after the day you arrive.",
    "The night market in the old town is the best place for cheap street food.",
    "Pack a light rain jacket, for the weather in the mountains changes within minutes.",
    # music
    "A violin has four strings, tuned in fifths.",
    "Beethoven was almost completely deaf when he wrote his ninth symphony.",
    "Jazz musicians improvise new melodies over a fixed sequence of chords.",
    "Play the difficult bar slowly with a metronome before you raise the tempo.",
    "The bass drum and the bass guitar together carry the rhythm of a rock band.",
)

QUERIES = (
    "Why should I wait before I cut the roast beef?",
    "How are planets around other stars discovered?",
    "How much money should I set aside for bad times?",
    "When is the right time to cut back fruit trees?",
    "How can I go back to an earlier version of my code?",
    "What should I do after touching a hot stove?",
    "How long does my passport have to be valid to enter the country?",
    "Which composer could not hear his own music?",
)
