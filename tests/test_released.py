"""The authors' release against a second implementation of it; its mask and EMA steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lodisc import LoDisc, attention_product, create_vit, location_mask, momentum_schedule
from released import Released, mask_above, scaled_product


def build(**options):
    torch.manual_seed(0)
    model = Released(create_vit("vit_nano", 40, 8, train_projection=True, learned_positions=True),
                     hidden_dim=64, **options)
    return model.train(), torch.randn(2, 6, 3, 40, 40)


# --- a second implementation, from a description of the release ------------------------------


def plain_predict(head, x, dropout=0.2):
    """The predictor's layers one by one; the dropout mask is drawn by torch's generator."""
    x = F.relu(F.batch_norm(F.linear(x, head[0].weight), None, None, head[1].weight, head[1].bias,
                            training=True))
    x = F.dropout(x, dropout, training=True)
    return F.batch_norm(F.linear(x, head[4].weight), None, None, training=True)


def plain_contrast(queries, keys, temperature=0.2):
    loss = 0
    for i, query in enumerate(queries):
        cosines = [F.cosine_similarity(query, key, dim=0) / temperature for key in keys]
        loss = loss - torch.stack(cosines).log_softmax(0)[i] / len(queries)
    return 2 * temperature * loss


def plain_mask(encoder, view, keep=0.30):
    """Nested lists, a row for each image: 1 strictly above the threshold."""
    _, matrices = encoder.with_attention(view, "matrix")
    product = torch.ones(len(view), encoder.num_patches)
    for matrix in matrices:
        product = product * (1000 * matrix[:, 0, 1:])
    rows = []
    for row in product.tolist():
        threshold = sorted(row, reverse=True)[int(keep * len(row))]
        rows.append([value > threshold for value in row])
    return rows


def plain_masked(view, rows, size):
    masked, side = view.clone(), view.shape[2] // size
    for image, row in zip(masked, rows):
        for patch, kept in enumerate(row):
            y, x = size * (patch // side), size * (patch % side)
            if not kept:
                image[:, y:y + size, x:x + size] = 0
    return masked


class PlainRelease:
    def __init__(self, model, learning_rate):
        self.base, self.head = copy.deepcopy(model.encoder), copy.deepcopy(model.predictor)
        self.slow = copy.deepcopy(self.base).requires_grad_(False)
        trained = [*self.base.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.5)

    @torch.no_grad()
    def ema(self, m):
        for slow, fast in zip(self.slow.parameters(), self.base.parameters()):
            slow.copy_(m * slow + (1 - m) * fast)

    def step(self, x1, x2, m):
        q1, q2 = (plain_predict(self.head, self.base(x)) for x in (x1, x2))
        self.ema(m)
        k1, k2 = self.slow(x1), self.slow(x2)
        self.ema(m)
        rows1 = plain_mask(self.slow, x1)
        self.ema(m)
        rows2 = plain_mask(self.slow, x2)
        l1, l2 = (self.slow(plain_masked(x, rows, 8)) for x, rows in ((x1, rows1), (x2, rows2)))
        losses = (plain_contrast(q1, k2) + plain_contrast(q2, k1),
                  plain_contrast(q1, l2) + plain_contrast(q2, l1))
        with torch.no_grad():  # for logging
            _ = [plain_predict(self.head, self.base(x)) for x in (x1, x2)]
        self.ema(m)
        self.optimizer.zero_grad()
        sum(losses).backward()
        self.optimizer.step()
        return losses, (q1, q2), (rows1, rows2)


def differ(a, b):
    return (a - b).norm().item() / b.norm().item()


def all_weights(encoder):
    """Return what the loss depends on but by rounding errors, which AdamW makes large: not the
    biases of keys, nor the last LayerNorm's, which the predictor's BatchNorm takes away."""
    weights = []
    for name, weight in encoder.named_parameters():
        if name.endswith("qkv.bias"):
            query, _, value = weight.chunk(3)
            weight = torch.cat([query, value])
        if name != "norm.bias":
            weights.append(weight.flatten())
    return torch.cat(weights)


def test_twenty_steps_match_a_second_implementation(monkeypatch):
    model, _ = build()
    steps, learning_rate = 20, 1.25e-4  # 1e-3 per 256 images, for 32
    plain = PlainRelease(model, learning_rate)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.5)
    first = all_weights(model.encoder).clone()
    queries, real = [], Released.query
    monkeypatch.setattr(Released, "query", lambda self, view: queries.append(real(self, view))
                        or queries[-1])
    torch.manual_seed(1)
    for step in range(steps):
        view1, view2 = torch.randn(2, 6, 3, 40, 40)
        dropout = torch.get_rng_state()
        output = model(view1, view2, None, step / steps)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        model.update_momentum(0.5)  # does nothing
        after = torch.get_rng_state()
        torch.set_rng_state(dropout)  # drawn in the same order
        m = 1 - 0.01 * (1 + math.cos(math.pi * step / steps)) / 2
        losses, plain_queries, rows = plain.step(view1, view2, m)
        assert torch.equal(torch.get_rng_state(), after)
        for loss, expected in zip((output.global_loss, output.local_loss), losses):
            assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        for query, expected in zip(queries[-4:-2], plain_queries):
            assert differ(query, expected) < 1e-4
        assert [mask.tolist() for mask in output.masks] == list(rows)
    for ours, other in ((model.encoder, plain.base), (model.momentum_encoder, plain.slow)):
        assert differ(all_weights(ours), all_weights(other)) < 1e-4
    assert differ(all_weights(model.encoder), first) > 5e-3


# --- its parts --------------------------------------------------------------------------------


def test_all_four_ema_steps_are_at_their_places(monkeypatch):
    """Record every pass and EMA step of a step, in order."""
    model, (view1, view2) = build()
    calls, name_of = [], {id(view1): "view 1", id(view2): "view 2"}
    for name, encoder in (("online", model.encoder), ("momentum", model.momentum_encoder)):
        def encode(images, *args, name=name, real=encoder.encode, **options):
            what = name_of.get(id(images), "masked")
            calls.append(f"{name}, {what}" + (", attention" if options.get("kind") else ""))
            return real(images, *args, **options)
        monkeypatch.setattr(encoder, "encode", encode)
    real = model.move_momentum_encoder
    monkeypatch.setattr(model, "move_momentum_encoder", lambda m: (calls.append(f"{m:.4f}"),
                                                                   real(m)))
    model(view1, view2, None, 0.25)
    m = f"{momentum_schedule(25, 100, 0.99):.4f}"
    assert calls == ["online, view 1", "online, view 2", m, "momentum, view 1", "momentum, view 2",
                     m, "momentum, view 1, attention", m, "momentum, view 2, attention",
                     "momentum, masked", "momentum, masked", "online, view 1", "online, view 2", m,
                     "momentum, view 1", "momentum, view 2"]


def test_momentum_encoder_moves_four_times_and_only_in_forward():
    model, views = build(momentum=0.9)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += torch.randn_like(parameter)
    before = copy.deepcopy(model.momentum_encoder.state_dict())
    online = copy.deepcopy(model.encoder.state_dict())
    model(*views, None, 0.0)
    for name, moved in model.momentum_encoder.state_dict().items():
        expected = online[name] + 0.9**4 * (before[name] - online[name])
        assert torch.allclose(moved, expected, atol=1e-5)
    after = copy.deepcopy(model.momentum_encoder.state_dict())
    model.update_momentum(0.0)
    assert all(torch.equal(after[name], weight)
               for name, weight in model.momentum_encoder.state_dict().items())


def test_every_trained_weight_has_a_gradient():
    """As DDP needs."""
    model, views = build()
    model(*views).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any("projector" in name for name, _ in model.named_parameters())
    assert all(p.grad is None for p in model.momentum_encoder.parameters())


def test_without_local_weight_the_local_branch_has_no_effect():
    model, views = build(local_weight=0.0)
    output = model(*views)
    assert output.total.item() == output.global_loss.item() and output.local_loss.item() > 0


@given(st.integers(1, 5), st.integers(4, 60), st.sampled_from([0.1, 0.3, 0.5, 1.0]),
       st.integers(0, 2**32 - 1))
def test_mask_is_strictly_above_the_threshold(batch, count, ratio, seed):
    importance = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed))
    mask = mask_above(importance, ratio)
    for values, row in zip(importance.tolist(), mask.tolist()):
        threshold = sorted(values, reverse=True)[min(count - 1, int(count * ratio))]
        assert row == [value > threshold for value in values]
    assert torch.equal(mask_above(torch.ones(1, count), ratio), torch.zeros(1, count).bool())


def test_58_of_196_patches_and_the_order_of_the_sum_of_logarithms():
    rows = torch.rand(12, 4, 196).softmax(-1).unbind()
    mask = mask_above(scaled_product(rows), 0.3)
    assert mask.sum(1).tolist() == [58] * 4
    assert torch.equal(mask, location_mask(attention_product(rows), 0.3))


def test_dropout_is_drawn_in_the_queries_alone():
    model, views = build()
    assert not torch.equal(model.query(views[0]), model.query(views[0]))
    assert torch.equal(model.key(views[0]), model.key(views[0]))
    assert torch.equal(model.key(views[0]), model.momentum_encoder(views[0]))
    assert model.predictor[3].p == 0.2 and model.predictor[4].out_features == model.encoder.dim


def test_accuracy_is_of_view_1_among_the_keys_of_view_2(monkeypatch):
    model, views = build()
    keys = torch.eye(6, 96)
    order = torch.tensor([0, 1, 2, 4, 3, 5])
    monkeypatch.setattr(model, "query", lambda view: keys[order] if view is view1 else -keys)
    monkeypatch.setattr(model, "key", lambda view: keys if view is view2 else keys.flip(0))
    view1, view2 = views
    assert model.log_accuracy(view1, view2, 0.99).item() == pytest.approx(4 / 6)


def test_options_are_those_that_the_release_has():
    assert set(Released.OPTIONS) == {"temperature", "hidden_dim", "keep_ratio", "global_weight",
                                     "local_weight", "momentum"}
    model, _ = build(keep_ratio=0.5, temperature=0.1)
    assert (model.keep_ratio, model.temperature, model.momentum) == (0.5, 0.1, 0.99)
    assert isinstance(model, LoDisc)
