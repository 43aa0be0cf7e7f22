"""Compare logits with Hugging Face's on the device that `load_model` would take here: CUDA if there is any.

A process of its own, started by test_device.py, because conftest.py hides CUDA from the rest of the suite.
Prints the device, the prompts, and how far a token's logits are apart, as a share of its largest.
"""

import torch

# CUDA is looked at before conftest.py hides it: what has been seen once stays. TF32 would round to 10 bits.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.zeros(1, device=DEVICE)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

from conftest import ROWS, make_pair, prompts
from hugging_face import hf_logits

from sampling import generate

torch.set_grad_enabled(False)
pair = make_pair()
pair.hf.to(DEVICE)
pair.ours.to(DEVICE)

for name, rows in ROWS.items():
    inputs = prompts(rows)
    real = inputs["attention_mask"].bool()
    ours = pair.ours(**inputs).cpu()[real]
    theirs = hf_logits(pair.hf, {key: value.to(DEVICE) for key, value in inputs.items()}).cpu()[real]
    apart = (ours - theirs).abs().amax(dim=-1) / theirs.abs().amax(dim=-1)
    print(pair.ours.device.type, name, apart.max().item(), sep="\t")

    # Replayed or not, the tokens are the same. (Without CUDA neither is.)
    replayed = [ids.tolist() for ids in generate(pair.ours, inputs, max_new_tokens=16)]
    plain = [ids.tolist() for ids in generate(pair.ours, inputs, max_new_tokens=16, graph=False)]
    assert replayed == plain, name
