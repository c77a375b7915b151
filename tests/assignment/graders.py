"""Graders of the assignment, in the order of the exercises. Each message is a hint.

A grader gives all of its points or none. It tests one function: what that calls is replaced, so
that a mistake costs points in one exercise. (PYTEST_DONT_REWRITE: no details by pytest.)"""

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lodisc

EXPECTED = torch.load(Path(__file__).with_name("expected.pt"), weights_only=True)


def points(number):
    """Say how many points a grader gives."""
    def mark(grader):
        grader.points = number
        return grader
    return mark


def close(result, expected, hint, tolerance=1e-5):
    assert torch.is_tensor(result), f"expected a tensor, got {type(result).__name__}"
    assert result.shape == expected.shape, \
        f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}: {hint}"
    assert bool(((result - expected).abs() <= tolerance * (1 + expected.abs())).all()), hint


def raises(hint, function, *arguments):
    try:
        function(*arguments)
    except ValueError:
        return
    except Exception as error:
        raise AssertionError(f"ValueError expected, not {type(error).__name__}: {hint}") from None
    raise AssertionError(f"ValueError expected: {hint}")


# --- attention ----------------------------------------------------------------------------------


def weights_and_expected():
    reference = EXPECTED["attention"]
    return lodisc.attention_weights(reference["q"], reference["k"]), reference["of q and k"]


@points(2)
def test_attention_sums_to_one():
    weights, expected = weights_and_expected()
    assert torch.is_tensor(weights) and weights.shape == expected.shape, \
        f"expected the shape {tuple(expected.shape)}"
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 4)), \
        "the weights of each query sum to 1 over the keys: along which axis is the softmax?"


@points(3)
def test_attention_is_scaled():
    weights, expected = weights_and_expected()
    close(weights, expected, "the weights sum to 1 but are wrong: which power of d scales q k^T?")


@points(2)
def test_attention_is_float32_under_autocast():
    reference = EXPECTED["attention"]
    large = lodisc.attention_weights(100 * reference["q"], reference["k"])
    close(large, reference["of 100 q and k"], "large products: exp overflows; softmax does not",
          tolerance=1e-2)
    q, k = (reference[name].bfloat16() for name in "qk")  # what autocast passes
    expected = lodisc.attention_weights(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        weights = lodisc.attention_weights(q, k)
    assert weights.dtype == torch.float32, "the product over layers needs float32 weights"
    close(weights, expected, "the result is float32, but a step before it is in half precision: "
          "under autocast a matrix product casts its inputs, float32 ones too")


def attention_layer():
    reference, layer = EXPECTED["attention"], lodisc.Attention(12, 3)
    layer.load_state_dict(reference["layer"])
    return layer.eval(), reference


def known_weights(q, k):
    """In place of attention_weights: the weights of the layer's queries (..., d), else zeros."""
    reference = EXPECTED["attention"]
    difference = q.flatten(0, -2)[:, None] - reference["layer q"].flatten(0, -2)
    nearest = difference.abs().amax(dim=2).min(dim=1)  # of each query
    weights = reference["layer weights"].flatten(0, -2)[nearest.indices]  # (queries, T)
    return (weights * (nearest.values < 1e-4)[:, None]).view(*q.shape[:-1], -1)


@torch.no_grad()
def run_attention(kind, class_only=False):
    layer, reference = attention_layer()
    with patch.object(lodisc, "attention_weights", known_weights):
        result = layer(reference["x"], kind, class_only)
    assert isinstance(result, (tuple, list)) and len(result) == 2, \
        "return the pair (features, weights)"
    return result


@points(3)
def test_attention_features():
    reference = EXPECTED["attention"]
    for kind in (None, "row", "matrix"):
        close(run_attention(kind)[0], reference["features"],
              "check how qkv(x) is cut and the heads are joined; the features must not depend on "
              "which weights are returned")


@points(1)
def test_attention_features_of_the_class_token():
    for kind in (None, "row", "matrix"):
        expected = run_attention(kind)[0][:, :1]
        close(run_attention(kind, class_only=True)[0], expected,
              "class_only: return the feature of the class token only, (B, 1, D)")


@points(2)
def test_attention_row():
    for class_only in (False, True):
        close(run_attention("row", class_only)[1], EXPECTED["attention"]["row"],
              "the row has the class token (the first token) as the query and all tokens as keys, "
              "averaged over the heads; if the features are wrong too, mend those first")


@points(2)
def test_attention_matrix():
    for class_only in (False, True):
        close(run_attention("matrix", class_only)[1], EXPECTED["attention"]["matrix"],
              "the matrix is that of the features, averaged over the heads; class_only changes "
              "the features, not the returned weights; if the features are wrong too, mend those "
              "first")
        assert run_attention(None, class_only)[1] is None, "kind=None: no weights are returned"


# --- positions ----------------------------------------------------------------------------------


def positions_of_tokens(side=3, dim=8):
    """Return the positions (1 + side * side, dim), also of a result whose first axis is missing."""
    positions = lodisc.sincos_positions(side, dim)
    shape = 1, 1 + side * side, dim
    assert torch.is_tensor(positions) and positions.numel() == math.prod(shape), \
        f"expected a tensor {shape}"
    return positions.reshape(shape[1:])


@points(1)
def test_positions_of_the_class_token_are_zero():
    positions = lodisc.sincos_positions(3, 8)
    assert torch.is_tensor(positions), "expected a tensor"
    assert positions.shape == (1, 10, 8), f"expected (1, 10, 8), got {tuple(positions.shape)}"
    assert positions.dtype == torch.float32, f"expected float32, got {positions.dtype}"
    assert positions[0, 0].abs().sum() == 0, "the class token is the first token; its row is zero"


@points(2)
def test_positions_encode_row_then_column():
    first, right, below = positions_of_tokens()[[1, 2, 4]]
    assert torch.equal(first[:4], right[:4]) and not torch.equal(first[4:], right[4:]), \
        "the next patch to the right has the same row: only the second half of the channels differs"
    assert torch.equal(first[4:], below[4:]) and not torch.equal(first[:4], below[:4]), \
        "the patch below has the same column: only the first half of the channels differs"


@points(2)
def test_positions_have_the_right_frequencies():
    for side, dim in ((3, 8), (2, 16)):
        close(positions_of_tokens(side, dim).float(), EXPECTED["positions"][dim],
              "check the frequencies, and which quarter of the channels is sine and which cosine")


# --- product ------------------------------------------------------------------------------------


@points(4)
def test_product_multiplies_layers():
    reference = EXPECTED["product"]
    close(lodisc.attention_product(reference["rows"]), reference["result"],
          "multiply the layers elementwise, and return the logarithm")


@points(2)
def test_product_does_not_underflow():
    importance = lodisc.attention_product([torch.tensor([[1e-6, 2e-6, 1e-30]])] * 24)
    assert torch.is_tensor(importance) and bool(importance.isfinite().all()), \
        "the product of 24 small weights underflows in float32"
    assert importance.argsort(dim=1).tolist() == [[2, 0, 1]], "24 layers: the order is lost"


@points(2)
def test_product_of_the_smallest_weights():
    importance = lodisc.attention_product([torch.tensor([[1e-6, 2e-6, 1e-30, 0.0]])] * 24)
    assert torch.is_tensor(importance) and bool(importance.isfinite().all()), \
        "the logarithm of 0 is infinite"
    close(importance[:, 3], torch.tensor([24 * math.log(torch.finfo(torch.float32).tiny)]),
          "a weight of 0 counts as float32's smallest normal number, in each layer")
    one_layer = lodisc.attention_product([torch.tensor([[0.0, 1e-40]]), torch.tensor([[0.9, 0.9]])])
    expected = math.log(torch.finfo(torch.float32).tiny) + math.log(0.9)
    close(one_layer, torch.tensor([[expected, expected]]),
          "each layer's weight below float32's smallest normal number counts as that number")
    close(importance[:, 2], torch.tensor([24 * math.log(1e-30)]),
          "a weight of 1e-30 is above float32's smallest normal number and stays as it is")


# --- rollout ------------------------------------------------------------------------------------


@points(1)
def test_rollout_of_identity_is_zero():
    alone = torch.eye(5).expand(2, 5, 5)
    importance = lodisc.attention_rollout([alone] * 3)
    assert torch.is_tensor(importance) and importance.shape == (2, 4), \
        "one value per patch: without the class token's own entry"
    assert importance.abs().sum() == 0, \
        "if every token attends to itself only, no patch reaches the class token"


@points(2)
def test_rollout_of_one_layer():
    attention = torch.full((1, 5, 5), 0.2)
    close(lodisc.attention_rollout([attention]), torch.full((1, 4), 0.1),
          "half of each layer is the identity, for the residual connection")


@points(3)
def test_rollout_orders_layers():
    reference = EXPECTED["rollout"]
    close(lodisc.attention_rollout(reference["matrices"]), reference["result"],
          "matrices do not commute: the last layer is the leftmost factor, and the class token's "
          "row of the product has the class token as the query")


# --- mask ---------------------------------------------------------------------------------------


def mask_of(importance, ratio):
    mask = lodisc.location_mask(importance, ratio)
    assert torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == importance.shape, \
        f"expected a bool tensor of the shape {tuple(importance.shape)}"
    return mask


@points(4)
def test_mask_keeps_exactly_k():
    for n, ratio, kept in ((10, 0.3, 3), (100, 0.29, 29), (196, 0.3, 58), (10, 0.05, 1),
                           (7, 1.0, 7), (9, 0.5, 4)):
        mask = mask_of(torch.randn(3, n), ratio)
        assert mask.sum(1).tolist() == [kept] * 3, \
            f"keep ratio {ratio} of {n} patches keeps {kept}: rounded down, at least one"


@points(4)
def test_mask_keeps_the_most_important():
    mask = mask_of(torch.tensor([[0.1, 5.0, -2.0, 3.0], [9.0, 1.0, 8.0, 0.0]]), 0.5)
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False]], \
        "True marks the kept patches, the most important of each image"


    close_values = 1 + torch.arange(100)[None] * 1e-5
    mask = mask_of(close_values, 0.3)
    assert mask[0].nonzero().flatten().tolist() == list(range(70, 100)), \
        "values that differ by little are not equal"
    assert torch.equal(close_values, 1 + torch.arange(100)[None] * 1e-5), \
        "the importance that is passed must not change"


@points(2)
def test_mask_breaks_ties_by_lower_index():
    mask = mask_of(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0] * 20]), 0.4)
    assert mask.sum() == 40, "equal importances must not make the mask larger or smaller"
    assert mask[0].nonzero().flatten().tolist() == [
        place for place in range(100) if place % 5 in (1, 2, 3)][:40], \
        "ties go to the lower index on every device: which sort guarantees that?"


# --- pixels -------------------------------------------------------------------------------------


def cut_pixels():
    """Return the images with a mask, and their four patches of 3 px each, by place."""
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6) + 1
    kept = torch.tensor([[True, False, False, True], [False, True, False, False]])
    before = images.clone()
    result = lodisc.mask_pixels(images, kept, 3)
    assert torch.is_tensor(result) and result.shape == images.shape, \
        f"expected images of the shape {tuple(images.shape)}"
    return result, before, images


@points(2)
def test_pixels_of_kept_patches_stay():
    result, before, _ = cut_pixels()
    assert torch.equal(result[0, :, :3, :3], before[0, :, :3, :3]), \
        "True marks the patches whose pixels stay as they are, in all three channels"


@points(2)
def test_pixels_of_other_patches_are_zero():
    result, _, _ = cut_pixels()
    assert result[0, :, :3, 3:].abs().sum() == 0, "all other pixels are zero, in all channels"


@points(2)
def test_pixels_are_cut_row_by_row():
    result, before, _ = cut_pixels()
    expected = torch.zeros_like(before)
    expected[0, :, :3, :3], expected[0, :, 3:, 3:] = before[0, :, :3, :3], before[0, :, 3:, 3:]
    expected[1, :, :3, 3:] = before[1, :, :3, 3:]
    assert torch.equal(result, expected), \
        "the patches are numbered row by row, and each image has its own row of kept ones"


@points(1)
def test_pixels_are_of_new_images():
    result, before, images = cut_pixels()
    assert torch.equal(images, before), "the images that are passed must not change"


@points(1)
def test_pixels_of_a_finer_grid():
    images, kept = torch.ones(1, 3, 12, 12), torch.zeros(1, 36, dtype=torch.bool)
    kept[0, 8] = True  # second row, third column
    result = lodisc.mask_pixels(images, kept, 2)
    assert torch.is_tensor(result) and result.sum() == 12 and result[0, :, 2:4, 4:6].sum() == 12, \
        "6 * 6 patches of 2 px: patch 8 is in the second row, third column"


# --- momentum update ----------------------------------------------------------------------------


def two_modules():
    """Return an online module of ones and a momentum module of fives, which has no gradient."""
    online, momentum = (nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3)))
                        for _ in range(2))
    for module, value in ((online, 1.0), (momentum, 5.0)):
        for tensor in module.state_dict().values():
            tensor.fill_(value)
    return online, momentum.requires_grad_(False)


@points(3)
def test_update_is_a_moving_average():
    online, momentum = two_modules()
    lodisc.momentum_update(online, momentum, 0.75)
    for parameter in momentum.parameters():
        assert (parameter != 5).any(), "some momentum parameters did not change"
        assert torch.allclose(parameter, torch.tensor(4.0)), \
            "m is the weight of the old momentum parameters, 1 - m that of the online ones"
    for m, value in ((1.0, 5.0), (0.0, 1.0)):
        online, momentum = two_modules()
        lodisc.momentum_update(online, momentum, m)
        assert torch.allclose(momentum[0].weight, torch.tensor(value)), f"m = {m} must give {value}"


@points(2)
def test_update_is_in_place():
    online, momentum = two_modules()
    parameter, place = momentum[0].weight, momentum[0].weight.data_ptr()
    lodisc.momentum_update(online, momentum, 0.75)
    assert (online[0].weight == 1).all(), "the online module must not change"
    assert (parameter != 5).all(), "the momentum module's own tensors did not change"
    assert momentum[0].weight is parameter and parameter.data_ptr() == place, \
        "update in place, in the same tensors"


@points(1)
def test_update_leaves_running_statistics():
    online, momentum = two_modules()
    lodisc.momentum_update(online, momentum, 0.75)
    assert (momentum[0].weight != 5).any(), "the parameters did not change"
    assert (momentum[0].running_mean == 5).all(), "BatchNorm's running statistics are not averaged"


@points(0)
def test_update_of_equal_weights():
    online, momentum = nn.Linear(30, 30), nn.Linear(30, 30)
    momentum.load_state_dict(online.state_dict())
    lodisc.momentum_update(online, momentum, 0.99)
    if not torch.equal(online.weight, momentum.weight):
        pytest.xfail("equal weights differ in the last bit after your update, which costs nothing; "
                     "is there an operation of torch that keeps them equal?")


# --- schedule -----------------------------------------------------------------------------------


def momentum_at(step, total, base):
    value = lodisc.momentum_schedule(step, total, base)
    assert isinstance(value, float), f"expected a float, got {type(value).__name__}"
    return value


@points(2)
def test_schedule_starts_at_base_and_ends_at_one():
    for total, base in ((8, 0.9), (5, 0.99)):
        assert momentum_at(0, total, base) == pytest.approx(base), "step 0 gives the base"
        assert momentum_at(total, total, base) == pytest.approx(1.0), "the last step gives 1"


@points(2)
def test_schedule_is_half_a_cosine_period():
    values = [momentum_at(step, 8, 0.9) for step in range(9)]
    assert values == sorted(values), "the momentum never decreases"
    assert values == pytest.approx(EXPECTED["schedule"], abs=1e-6), \
        "half a cosine period: at half of the steps it is halfway between the base and 1"
    assert momentum_at(5, 10, 0.5) == pytest.approx(0.75, abs=1e-6), \
        "half of the steps: halfway between the base and 1, for any base and total"


# --- loss ---------------------------------------------------------------------------------------


def queries_and_keys():
    return EXPECTED["loss"]["queries"].clone(), EXPECTED["loss"]["keys"].clone()


def loss_of(queries, keys, temperature, offset=0):
    before = [queries.detach().clone(), keys.detach().clone()]
    loss = lodisc.contrastive_loss(queries, keys, temperature, offset)
    assert torch.is_tensor(loss) and loss.shape == (), "return a scalar tensor"
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1]), \
        "the queries and keys that are passed must not change"
    return loss


@points(3)
def test_loss_of_equal_features_is_chance_level():
    for temperature in (0.25, 0.1, 0.01):
        loss = loss_of(torch.ones(4, 8), torch.ones(6, 8), temperature)
        assert loss.item() == pytest.approx(2 * temperature * math.log(6), abs=1e-5), \
            "equal features: each of 6 keys has probability 1 / 6; the loss is scaled by 2 T"


@points(2)
def test_loss_is_scale_invariant():
    queries, keys = queries_and_keys()
    one, other = (loss_of(scale * queries, keys / scale, 0.2).item() for scale in (1, 7))
    assert one == pytest.approx(other, abs=1e-5), "features are normalised first"


@points(2)
def test_loss_has_a_gradient_for_queries_alone():
    queries, keys = (features.requires_grad_() for features in queries_and_keys())
    loss = loss_of(queries, keys, 0.2)
    assert loss.requires_grad, "the queries need a gradient"
    loss.backward()
    close(queries.grad, EXPECTED["loss"]["gradient"], "the queries' gradient is incomplete")
    assert keys.grad is None or keys.grad.abs().sum() == 0, "the keys must get no gradient"


@points(2)
def test_loss_is_float32_under_autocast():
    queries, keys = queries_and_keys()
    expected = loss_of(queries, keys, 0.2).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(queries, keys, 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5), \
        "some step is computed in half precision"


@points(3)
def test_loss_matches_reference():
    reference = EXPECTED["loss"]
    for temperature, expected in zip((0.2, 0.7, 0.01), reference["result"]):
        loss = loss_of(*queries_and_keys(), temperature)
        assert loss.item() == pytest.approx(expected, rel=1e-4), \
            f"temperature {temperature}: it divides the similarities once and multiplies the " \
            "loss once; the softmax of each query is over all keys, and key i is query i's positive"


@points(2)
def test_loss_with_an_offset():
    reference = EXPECTED["loss"]
    without, with_offset = (loss_of(*queries_and_keys(), 0.2, offset).item()
                            for offset in (0, 2))
    expected = reference["with offset"] / reference["result"][0]
    assert with_offset / without == pytest.approx(expected, rel=1e-4), \
        "the positive key of query i is key offset + i"


# --- forward: its parts are stubs that record what they get ---------------------------------------


QUERIES, KEYS, LOCAL_KEYS = ("q1", "q2"), ("k1", "k2"), ("l1", "l2")
NAMES = QUERIES + KEYS + LOCAL_KEYS
VIEWS = torch.arange(2.0 * 4 * 3 * 8 * 8).view(2, 4, 3, 8, 8)
CHOSEN = torch.tensor([[True, False], [False, True]]).repeat(1, 2)[:, None].repeat(1, 4, 1)


def numbers_of(images):
    """Return the numbers of the views in images: [1] or [2], or two of both in one pass."""
    numbers = []
    for part in images.split(4):
        numbers += [number for number, view in enumerate(VIEWS, start=1) if torch.equal(part, view)]
    assert len(numbers) * 4 == len(images) > 0, "each pass has one view, as forward gets it"
    return numbers


def make_stub(base):
    """Return a model of a class of lodisc.py whose passes are stubs. Its queries and keys say what
    they are by their values, and its losses by theirs; `calls` has the names of the passes."""

    class Stub(base):
        global_weight = local_weight = 1.0

        def __init__(self):
            nn.Module.__init__(self)
            self.calls, self.pairs, self.generators, self.masks_fit = [], [], [], []
            self.online, self.momentum = (nn.Parameter(torch.ones(1)) for _ in range(2))

        def make(self, kind, view, weight):
            numbers = numbers_of(view)
            self.calls.append(kind + "".join(map(str, numbers)))
            values = [10.0 + NAMES.index(f"{kind}{number}") for number in numbers]
            return weight * torch.tensor(values).repeat_interleave(4)[:, None].repeat(1, 2)

        def query(self, view):
            return self.make("q", view, self.online)

        def key(self, view):
            return self.make("k", view, self.momentum)

        def key_and_mask(self, view, generator=None):
            self.generators.append(generator)
            return self.key(view), torch.cat([CHOSEN[number - 1] for number in numbers_of(view)])

        def local_key(self, view, mask):
            expected = torch.cat([CHOSEN[number - 1] for number in numbers_of(view)])
            self.masks_fit.append(torch.equal(mask, expected))
            return self.make("l", view, self.momentum)

        def contrast(self, query, key):
            pair = name_of(query), name_of(key)
            assert pair[0] in QUERIES and pair[1] not in QUERIES, \
                f"contrast({', '.join(pair)}): first a query, then a key"
            self.pairs.append(pair)
            return value_of(pair) * (query / query.detach()).mean() * (key / key.detach()).mean()

        def update_momentum(self, m):
            raise AssertionError("the training loop calls update_momentum; forward must not")

    return Stub()


def name_of(tensor):
    """Return which of the stub's queries and keys a tensor is."""
    place = round(tensor.detach().mean().item() - 10)
    assert tensor.shape == (4, 2) and 0 <= place < len(NAMES), \
        "contrast takes a query and a key of four images, as the passes return them"
    return NAMES[place]


def value_of(pair):
    """Return the stub's loss of a query and a key: a power of 4, so that a sum of a few losses says
    which they are, also in float32."""
    return 4.0 ** (QUERIES.index(pair[0]) * 4 + (KEYS + LOCAL_KEYS).index(pair[1]))


def forward(method, generator=None, weights=(1.0, 1.0)):
    """Return the stub and the result of the student's forward."""
    model = make_stub(lodisc.METHODS[method])
    model.global_weight, model.local_weight = weights
    try:
        output = model(*VIEWS, generator)
    except AttributeError as error:
        raise AssertionError("forward is made of query, key (or key_and_mask and local_key) and "
                             f"contrast: {error}") from None
    expected = {"mocov3": lodisc.MoCoV3Output, "lodisc": lodisc.LoDiscOutput}[method]
    assert isinstance(output, expected), f"return a {expected.__name__}"
    return model, output


def check_pairs(model, loss, keys):
    """Check that a loss of the stub is the sum over both directions, with these keys."""
    assert torch.is_tensor(loss) and loss.shape == (), "each loss is a scalar tensor"
    if loss.item() == value_of((QUERIES[0], keys[1])) + value_of((QUERIES[1], keys[0])):
        return
    summed = [pair for pair in model.pairs if loss.item() // value_of(pair) % 4 > 0]
    if loss.item() == sum(map(value_of, set(summed))):
        for query, key in summed:
            assert query[1] != key[1], \
                f"contrast({query}, {key}): both are of view {key[1]}; the key is the OTHER view's"
            assert key in keys, f"{key} has no place in this loss, only {' and '.join(keys)}"
    raise AssertionError("expected the sum of both directions: each view's query once, against the "
                         f"other's key; the keys are {' and '.join(keys)}")


def check_passes(model, expected):
    assert sorted(model.calls) == expected, \
        f"expected one pass each of {', '.join(expected)}, got {', '.join(model.calls)}; in a " \
        "common pass BatchNorm mixes the views"


def check_gradients(output, model):
    assert output.total.requires_grad, "the total has no gradient; the queries need one"
    output.total.backward()
    assert model.online.grad is not None and model.online.grad.abs() > 0, \
        "the queries need a gradient"
    assert model.momentum.grad is None or model.momentum.grad == 0, \
        "the keys must get no gradient: they are targets"


def check_invalid_views(method):
    model = make_stub(lodisc.METHODS[method])
    model.query = model.key = lambda view: view.flatten(1)
    model.key_and_mask = lambda view, generator=None: (view.flatten(1), CHOSEN[0])
    model.local_key = lambda view, mask: view.flatten(1)
    model.contrast = lambda query, key: query.sum()
    view1, view2 = VIEWS
    raises("a batch of one image has no negatives", model, view1[:1], view2[:1])
    raises("the views differ in shape", model, view1, view2[:3])
    raises("the views differ in shape", model, view1[:3], view2)
    raises("the views differ in shape", model, view1, view2[..., :4])


# --- MoCoV3.forward -------------------------------------------------------------------------------


@points(5)
def test_mocov3_contrasts_with_the_other_view():
    model, output = forward("mocov3")
    check_pairs(model, output.global_loss, KEYS)


@points(1)
def test_mocov3_total():
    _, output = forward("mocov3")
    assert output.total.item() == output.global_loss.item(), \
        "MoCo v3 has one term: the total is that"


@points(1)
def test_mocov3_has_a_pass_of_its_own_for_each_view():
    model, _ = forward("mocov3")
    check_passes(model, ["k1", "k2", "q1", "q2"])


@points(2)
def test_mocov3_has_no_gradient_to_its_targets():
    model, output = forward("mocov3")
    check_gradients(output, model)


@points(1)
def test_mocov3_raises_for_invalid_views():
    check_invalid_views("mocov3")


# --- LoDisc.key_and_mask, LoDisc.local_key --------------------------------------------------------


class StubEncoder(nn.Module):
    """Has features that follow from its input, and records its passes."""

    patch_size, num_patches, dim = 2, 16, 12

    def __init__(self):
        super().__init__()
        self.passes = []

    def encode(self, images, keep=None, kind=None, class_only=False):
        self.passes.append((images, keep))
        features = F.adaptive_avg_pool2d(images, 2).flatten(1)
        if keep is not None:
            features = features + keep.sum(1, keepdim=True)
        return features, features[:, None], [torch.full((len(images), 16), 0.25)]

    def forward(self, images, keep=None):
        return self.encode(images, keep)[0]

    def tokens(self, images, keep=None):
        return self.encode(images, keep)[:2]

    def with_attention(self, images, kind):
        return self.encode(images, kind=kind)[::2]


class Head(nn.Module):
    """Another for the online and the momentum side, so that they are told apart."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, features):
        return self.scale * features + 1


IMPORTANCE = torch.arange(54.0).view(3, 18).cos()  # of two registers and 16 patches


def parts_of_lodisc(local_input="pixels"):
    """Return a LoDisc of stubs whose importance is IMPORTANCE, and views of 8 px."""
    model = lodisc.LoDisc.__new__(lodisc.LoDisc)
    nn.Module.__init__(model)
    model.encoder, model.momentum_encoder = StubEncoder(), StubEncoder()
    model.projector, model.momentum_projector, model.predictor = Head(7.0), Head(3.0), Head(5.0)
    model.mask, model.importance, model.local_input = "location", "product", local_input
    model.keep_ratio, model.num_kept = 0.3, 4
    if local_input == "crop":
        model.keep_ratio, model.num_kept, model.pivotal_mask = 0.6, 9, lodisc.box_mask
    return model, EXPECTED["keys"]["view"].clone()


def run_key_and_mask(mask="location", local_input="pixels", generator=None, name="product"):
    """Run key_and_mask with another importance and mask in the registries; return the model, the
    key, the mask and what the mask's function got."""
    model, view = parts_of_lodisc(local_input)
    model.mask, model.importance, received = mask, name, []

    def choose(importance, keep_ratio, generator=None):
        received.append((importance, keep_ratio, generator))
        return importance > 0

    importance = lodisc.Importance(lambda attentions, patches: IMPORTANCE, "row")
    other = lodisc.Importance(lambda attentions, patches: -IMPORTANCE, "row")
    others = dict.fromkeys(lodisc.IMPORTANCES, other)
    with patch.dict(lodisc.IMPORTANCES, {**others, name: importance}), \
            patch.dict(lodisc.MASKS, {mask: lodisc.Mask(choose)}):
        result = model.key_and_mask(view, generator)
    assert isinstance(result, (tuple, list)) and len(result) == 2, "return the pair (key, mask)"
    return model, *result, received


@points(2)
def test_keys_are_of_the_target_side():
    model, key, _, _ = run_key_and_mask()
    features = StubEncoder()(EXPECTED["keys"]["view"])
    close(key, model.momentum_projector(features),
          "z_k: the momentum encoder's features through the momentum projector")


@points(2)
def test_keys_come_with_the_chosen_patches():
    generator = torch.Generator()
    for mask, name in (("location", "product"), ("random", "last")):
        _, _, chosen, received = run_key_and_mask(mask, generator=generator, name=name)
        assert len(received) == 1, "call the function that MASKS has for self.mask, once"
        (importance, keep_ratio, passed), = received
        assert torch.equal(importance, IMPORTANCE[:, 2:]), \
            "its first argument is the importance of the patches, by self.importance"
        assert keep_ratio == 0.3, "its second argument is self.keep_ratio"
        assert passed is generator, "its third argument is the generator"
        assert torch.equal(chosen, IMPORTANCE[:, 2:] > 0), "return what it chose"


@points(1)
def test_keys_need_one_pass():
    model, _, _, _ = run_key_and_mask()
    assert len(model.momentum_encoder.passes) == 1, \
        "one pass of the momentum encoder gives both the features and the attention"
    assert not model.encoder.passes, "the online encoder has no part in a key"


@points(3)
def test_keys_of_pivotal_patches():
    model, view = parts_of_lodisc()
    reference = EXPECTED["keys"]

    def known_pixels(images, kept, patch_size):
        is_known = torch.equal(images, view) and torch.equal(kept, reference["kept"])
        return reference["pixels"] if is_known and patch_size == 2 else torch.zeros_like(images)

    before = view.clone()
    with patch.object(lodisc, "mask_pixels", known_pixels):
        key = model.local_key(view, reference["kept"])
    assert torch.equal(view, before), "the view that is passed must not change"
    assert model.momentum_encoder.passes and not model.encoder.passes, \
        "the local branch is the momentum side's too"
    close(model.momentum_encoder.passes[0][0], reference["pixels"],
          '"pixels": the encoder sees the view with all but the kept patches set to zero')
    close(key, model.momentum_projector(StubEncoder()(reference["pixels"])),
          "z_l: the momentum projector follows the momentum encoder")


@points(1)
def test_keys_of_pivotal_patches_alone():
    model, view = parts_of_lodisc("tokens")
    reference = EXPECTED["keys"]
    key = model.local_key(view, reference["kept"])
    assert len(model.momentum_encoder.passes) == 1, "one pass of the momentum encoder"
    (images, keep), = model.momentum_encoder.passes
    assert torch.equal(images, view), '"tokens": the whole view enters, and keep chooses patches'
    assert keep is not None and torch.equal(keep, lodisc.kept_indices(reference["kept"], 4)), \
        '"tokens": keep has the indices of the num_kept kept patches'
    close(key, model.momentum_projector(StubEncoder()(view, keep)),
          "z_l: the momentum projector follows the momentum encoder")


@points(1)
def test_keys_of_a_box():
    model, _, chosen, received = run_key_and_mask(local_input="crop")
    assert not received and torch.equal(chosen, lodisc.box_mask(IMPORTANCE[:, 2:], 0.6)), \
        '"crop": the patches are those of box_mask'
    view = EXPECTED["keys"]["view"]
    key = model.local_key(view, chosen)
    enlarged = lodisc.enlarge_box(view, chosen, 2, 3)
    close(key, model.momentum_projector(StubEncoder()(enlarged)),
          '"crop": the box of num_kept = 3 * 3 patches, enlarged, enters the encoder')


# --- LoDisc.forward -------------------------------------------------------------------------------


@points(1)
def test_lodisc_contrasts_whole_views():
    model, output = forward("lodisc")
    check_pairs(model, output.global_loss, KEYS)
    assert model.calls.count("k1") == model.calls.count("k2") == 1, \
        "one call per view gives the key and what is kept"


@points(2)
def test_lodisc_contrasts_pivotal_patches():
    model, output = forward("lodisc")
    check_pairs(model, output.local_loss, LOCAL_KEYS)


@points(1)
def test_lodisc_has_a_pass_of_its_own_for_each_view():
    model, _ = forward("lodisc")
    check_passes(model, ["k1", "k2", "l1", "l2", "q1", "q2"])
    assert all(model.masks_fit), "the local key of a view needs what was kept of the same view"


@points(2)
def test_lodisc_total():
    for weights in ((1.0, 1.0), (0.5, 4.0)):
        _, output = forward("lodisc", weights=weights)
        expected = weights[0] * output.global_loss + weights[1] * output.local_loss
        assert output.total.item() == expected.item(), \
            f"global_weight, local_weight = {weights}: the total is the sum weighted by these"


@points(1)
def test_lodisc_returns_its_terms_without_their_weights():
    _, equal = forward("lodisc")
    _, weighted = forward("lodisc", weights=(0.5, 4.0))
    assert weighted[1:3] == equal[1:3], "only the total is weighted"


@points(1)
def test_lodisc_returns_what_was_kept():
    _, output = forward("lodisc")
    assert len(output.masks) == 2 and all(map(torch.equal, output.masks, CHOSEN)), \
        "what was kept: first of view 1, then of view 2"
    generator = torch.Generator()
    model, _ = forward("lodisc", generator)
    assert model.generators == [generator] * 2, "key_and_mask needs the generator, for both views"
    assert [call for call in model.calls if call[0] == "k"] == ["k1", "k2"], \
        "view 1 comes first: a random choice draws in this order"


@points(1)
def test_lodisc_has_no_gradient_to_its_targets():
    model, output = forward("lodisc")
    check_gradients(output, model)


@points(1)
def test_lodisc_raises_for_invalid_views():
    check_invalid_views("lodisc")
