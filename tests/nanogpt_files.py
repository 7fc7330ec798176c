"""A GPT-2 in plain torch with nanoGPT's and build-nanogpt's tensor names, and nanoGPT's checkpoint of it."""

import torch
from torch import nn

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
GELUS = {"gelu": nn.GELU(), "gelu_new": nn.GELU(approximate="tanh")}


class Reference(nn.Module):
    """The function that nanoGPT and build-nanogpt compute, with their tensor names, in plain torch."""

    def __init__(self, vocab_size=97, bias=True, gelu="gelu", mask=False, n_head=2, n_embd=32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.n_head, self.gelu = n_head, GELUS[gelu]

        def norm():
            return nn.LayerNorm(n_embd, bias=bias)

        blocks = []
        for _ in range(SHAPE["n_layer"]):
            attn, mlp = nn.Module(), nn.Module()
            attn.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
            attn.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
            mlp.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
            mlp.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
            if mask:
                attn.register_buffer("bias", torch.ones(1, 1, SHAPE["block_size"], SHAPE["block_size"]).tril())
            blocks.append(nn.ModuleDict({"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(SHAPE["block_size"], n_embd),
                "h": nn.ModuleList(blocks),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for parameter in self.parameters():  # large enough for a wrong GELU or a lost bias to show
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)

    @torch.no_grad()
    def forward(self, ids):
        batch, length = ids.shape
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[:length]
        for block in self.transformer.h:
            heads = block.attn.c_attn(block.ln_1(x)).view(batch, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(batch, length, -1))
            x = x + block.mlp.c_proj(self.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


def save_nanogpt(path, model, prefix="_orig_mod.", **changes):
    """Write a checkpoint as nanoGPT's train.py does; a change to `None` removes a model argument."""
    model_args = {**SHAPE, "bias": True, "vocab_size": model.lm_head.out_features, "dropout": 0.2} | changes
    optimizer = torch.optim.AdamW(model.parameters())
    model.lm_head.weight.sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "model_args": {name: value for name, value in model_args.items() if value is not None},
            "iter_num": 250,
            "best_val_loss": torch.tensor(3.5),
            "config": {"out_dir": "out", "n_layer": SHAPE["n_layer"], "compile": True},
        },
        path,
    )
    return path


def draw_ids(vocab_size=97):
    return torch.randint(0, vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))


def assert_same_function(model, reference, ids=None):
    ids = draw_ids() if ids is None else ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference(ids)[..., : logits.shape[-1]], atol=1e-5, rtol=0)
