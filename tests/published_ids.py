"""Token ids published for GPT-2's own tokenizer, by text."""

PUBLISHED = {
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
    "Hello world": [15496, 995],
    " the": [262],
    "\n\n": [628],
    "": [],
}
