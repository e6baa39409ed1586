"""Tiny random encoders of transformers, and what they compute, for the tests of merging them."""

import functools

import numpy as np
import torch
import transformers

HEADS = 6
TEXT = {
    "vocab_size": 40,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
SOUND = {
    "vocab_size": 40,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 5,
    "max_source_positions": 9,
    "max_target_positions": 9,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
CLIP = {**TEXT, "eos_token_id": 39, "bos_token_id": 38, "pad_token_id": 39}
PICTURES = {**TEXT, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1}

MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "bert with a head": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**TEXT, hidden_act="gelu_new")
    ),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**TEXT, layer_norm_eps=1e-5)
    ),
    "clip text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=CLIP, vision_config=PICTURES)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**SOUND)
    ),
}


def randomised(model, seed=0):
    """The model with parameters large enough for attention to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            drawn = 0.3 * torch.randn(x.shape, generator=generator)
            norm = "norm" in name.lower() and name.endswith("weight")
            x.copy_(drawn + 1.0 if norm else drawn)
    return model.eval()


def inputs_of(kind, seed=0, count=7):
    """Token ids of texts of different lengths, padded, or features; and which tokens are real."""
    rng = np.random.default_rng(seed)
    if kind == "whisper":
        return rng.standard_normal((count, 5, 18)).astype(np.float32), np.ones((count, 9), bool)
    lengths = rng.integers(4, 14, count)
    real = np.arange(14) < lengths[:, None]
    ids = rng.integers(2, 37, (count, 14))
    if kind.startswith("clip"):
        ids[np.arange(count), lengths - 1] = CLIP["eos_token_id"]
        return np.where(real, ids, CLIP["eos_token_id"]), real
    real[0] = real[0, ::-1]  # padded in front
    return np.where(real, ids, 1 if kind == "roberta" else 0), real


def encoder_of(model):
    """The module that is merged: it gives the hidden states."""
    for path in ("model.encoder", "text_model", "bert"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return model


def run(model, kind, inputs, real):
    """(last hidden states BTD, [what the attention of each layer saw, BTD])."""
    seen, hooks = [], []
    encoder = encoder_of(model)
    for name, module in encoder.named_modules():
        if name.endswith(("self.query", "self_attn.q_proj")):
            keep = functools.partial(lambda seen, m, args: seen.append(args[0].numpy()), seen)
            hooks.append(module.register_forward_pre_hook(keep))
    arguments = {} if kind == "whisper" else {"attention_mask": torch.tensor(real).long()}
    with torch.no_grad():
        out = encoder(torch.tensor(inputs), **arguments).last_hidden_state.numpy()
    for hook in hooks:
        hook.remove()
    return out, seen


def naive_energies(seen, real, before, after, groups):
    """(of logits, of values): energy and what of it is lost, (K,) each, by loops over heads.

    Every query with every key that is centred in its text; what one token's value adds, centred.
    """
    texts = [np.float64(x[mask]) for x, mask in zip(seen, real, strict=True)]
    everything = np.concatenate(texts)

    def project(x, layer, part, n):
        dense = layer[part]
        n = n * dense["kernel"].shape[1] // HEADS
        bias = dense["bias"][n] if "bias" in dense else 0.0
        return x @ np.float64(dense["kernel"][:, n]) + bias

    keys, values = np.zeros((2, 2, HEADS))
    for n in range(HEADS):
        logits, added = [], []
        for layer in (before, after):
            k = [project(x, layer, "key", n) for x in texts]
            k = np.concatenate([x - x.mean(0) for x in k])
            logits.append(project(everything, layer, "query", n) @ k.T)
            v = project(everything, layer, "value", n) @ np.float64(layer["out"]["kernel"][n])
            added.append(v - v.mean(0))
        keys[:, n] = [np.mean(x**2) for x in (logits[0], logits[0] - logits[1])]
        values[:, n] = [np.mean(np.sum(x**2, 1)) for x in (added[0], added[0] - added[1])]
    return tuple(x.reshape(2, groups, -1).sum(-1) for x in (keys, values))
