"""Published scores of GPT-2 and GPT-3 on HellaSwag's validation split, measured by others.

Scores measured by this package are in `evaluation.baseline`; `plots.references` selects the comparable ones from both.
The published scores were not all measured the same way:

- GPT-2 124M and 1558M: docstring of `hellaswag.py` in karpathy/build-nanogpt; `original` measured by that script,
  `lm_eval` by EleutherAI's harness.
- GPT-2 350M and 774M: `hella2_baseline` in `play.ipynb` of the same repository, which compares its runs with them. How
  they were measured is unknown; its values for 124M (0.2945) and 1558M (0.4889) are within 0.0011 of the script's.
- GPT-3 125M: GPT-3 paper (https://arxiv.org/abs/2005.14165), table H.1, HellaSwag, zero-shot, "Small". The paper
  compares the likelihood per token (section 2.4), as `acc_norm` in `original` does, but published neither its
  rendering of the items nor the model.
"""

PUBLISHED_SCORES: dict[tuple[str, str], dict[str, float]] = {
    ("original", "acc"): {"GPT-2 124M": 0.2859, "GPT-2 1558M": 0.3842},
    ("original", "acc_norm"): {
        "GPT-2 124M": 0.2955,
        "GPT-2 350M": 0.375224,
        "GPT-2 774M": 0.431986,
        "GPT-2 1558M": 0.4893,
        "GPT-3 125M": 0.337,
    },
    ("lm_eval", "acc"): {"GPT-2 124M": 0.2892, "GPT-2 1558M": 0.4004},
    ("lm_eval", "acc_norm"): {"GPT-2 124M": 0.3114, "GPT-2 1558M": 0.5089},
}
PUBLISHED_MODELS = tuple(PUBLISHED_SCORES["original", "acc_norm"])

PUBLISHED_NOTE = """\
Published by others, not measured here. GPT-2 124M and 1558M: build-nanogpt's
hellaswag.py; 350M and 774M: its play.ipynb; GPT-3 125M: GPT-3 paper,
table H.1, zero-shot, per token."""
