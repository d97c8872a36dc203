"""The contrast loss computed by its definition, without packing or chunks."""

import torch


def per_sample_loss(model, samples):
    """The mean loss of the kept steps: for each, a forward pass on its prefix alone and a dense label."""
    losses = []
    for sample in samples:
        contrast = sample.contrast
        for index, step in enumerate(contrast.steps):
            prefix = [*sample.prompt_token_ids.tolist(), *sample.token_ids[:step].tolist()]
            log_model = model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
            span = slice(contrast.label_offsets[index], contrast.label_offsets[index + 1])
            label = torch.zeros(log_model.shape)
            label[contrast.label_ids[span].tolist()] = torch.tensor(contrast.label_weights[span])
            losses.append((label * (label.clamp_min(1e-30).log() - log_model)).sum())
    return torch.stack(losses).mean()
