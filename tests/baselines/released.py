"""LoDisc as its authors released it, as a method file.

    python train.py --method tests/baselines/released.py:Released --data cars --init imagenet \\
        --image-size 224 --epochs 100 --warmup-epochs 0 --batch-size 32 --lr 1e-3 \\
        --encoder-lr 1.25e-4 --weight-decay 0.5 --momentum 0.99 --crop-min 0.08 --amp fp16

is the release's recipe; learning rate and batch size are those of its README until April 2025, and
are left open today. Written from facts of the released code (huanglab-research/LoDisc), which has
no licence: no line of it is used. `--local-weight 0` is the same without the local branch.

    step                 the paper's figure (lodisc.py)     the release (here)
    projector            encoder -> projector -> predictor  none: built there and never called
    predictor            MoCo v3's                          dropout 0.2 after its ReLU; as wide an
                                                            output as the encoder's
    keys                 projections                        class tokens after the last LayerNorm
    EMA steps            one, after the optimiser's         four, of the same online weights,
                                                            inside the forward pass
    attention            of the pass that gives the key     a pass of its own for each view, after
                                                            another EMA step
    product over layers  sum of logarithms                  of 1000 times each weight: one order
    mask                 exactly floor(0.3 N) patches       strictly above the value at that place:
                                                            as many, fewer if values are equal
    logging              the losses                         both views once more through both
                                                            encoders: the accuracy of view 1

What the release does outside the method is not here: it retrieves by the predictor's output, and
reports each metric's best epoch on the test images. Under torchrun all ranks draw the same dropout,
as they are seeded alike, so that --resume is exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lodisc import LoDisc, check_views, gather_keys, momentum_schedule, momentum_update


def predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """MoCo v3's head with dropout: (B, dim) -> (B, dim)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(hidden_dim, dim, bias=False), nn.BatchNorm1d(dim, affine=False))


def scaled_product(attentions: list[Tensor]) -> Tensor:
    """Rows (B, N), one per layer -> (B, N), the product over layers of 1000 times each weight."""
    return torch.stack([1000 * row for row in attentions]).prod(dim=0)


def mask_above(importance: Tensor, keep_ratio: float) -> Tensor:
    """Keep what is strictly above the value at index floor(keep_ratio * N) of those in descending
    order: (B, N) -> bool (B, N). With a ratio of 1 the value is the least."""
    count = importance.shape[1]
    index = min(int(count * keep_ratio), count - 1)
    return importance > importance.sort(dim=1, descending=True).values[:, index:index + 1]


class ReleasedOutput(NamedTuple):
    total: Tensor
    global_loss: Tensor
    local_loss: Tensor
    accuracy: Tensor  # of view 1's queries among the keys, as a fraction
    masks: tuple[Tensor, Tensor]


class Released(LoDisc):
    """The authors' release as it runs; the file's docstring says where it differs from the figure.

    momentum  of the EMA at the start, rising to 1; the other arguments as for LoDisc. The step's
              momentum is computed from progress, and `update_momentum` does nothing
    Encoder passes over a view each: four online, eight momentum."""

    OPTIONS = ("temperature", "hidden_dim", "keep_ratio", "global_weight", "local_weight",
               "momentum")

    def __init__(self, encoder, momentum=0.99, hidden_dim=4096, **options):
        super().__init__(encoder, hidden_dim=hidden_dim, output_dim=encoder.dim, **options)
        self.momentum = momentum
        # a projector without use would leave parameters without gradient, which stops DDP
        self.projector = self.momentum_projector = nn.Identity()
        self.predictor = predictor(encoder.dim, hidden_dim)

    def forward(self, view1, view2, generator=None, progress=0.0):
        """As `LoDisc.forward` -> ReleasedOutput, in the order of the release."""
        check_views(view1, view2)
        m = momentum_schedule(progress, 1, self.momentum)
        q1, q2 = self.query(view1), self.query(view2)
        with torch.no_grad():
            self.move_momentum_encoder(m)
            k1, k2 = self.key(view1), self.key(view2)
            self.move_momentum_encoder(m)
            mask1 = self.strict_mask(view1)
            self.move_momentum_encoder(m)
            mask2 = self.strict_mask(view2)
            l1, l2 = self.local_key(view1, mask1), self.local_key(view2, mask2)
        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)
        local_loss = self.contrast(q1, l2) + self.contrast(q2, l1)
        total = self.global_weight * global_loss + self.local_weight * local_loss
        accuracy = self.log_accuracy(view1, view2, m)
        return ReleasedOutput(total, global_loss, local_loss, accuracy, (mask1, mask2))

    def move_momentum_encoder(self, m):
        momentum_update(self.encoder, self.momentum_encoder, m)

    def strict_mask(self, view):
        """A pass of the momentum encoder for the mask alone, bool (B, N)."""
        _, attentions = self.momentum_encoder.with_attention(view, "row")
        return mask_above(scaled_product(attentions), self.keep_ratio)

    @torch.no_grad()
    def log_accuracy(self, view1, view2, m):
        """Encode both views again, the predictor's dropout drawn again, and move the momentum
        encoder a fourth time -> the fraction of view 1's queries whose nearest key is their own."""
        query, _ = self.query(view1), self.query(view2)
        self.move_momentum_encoder(m)
        _, key = self.key(view1), self.key(view2)
        keys, offset = gather_keys(nn.functional.normalize(key, dim=1))
        nearest = (nn.functional.normalize(query, dim=1) @ keys.T).argmax(1)
        own = offset + torch.arange(len(query), device=query.device)
        return (nearest == own).float().mean()

    def update_momentum(self, m):
        """Nothing: `forward` has done it."""

    @torch.no_grad()
    def pivotal_patches(self, images):
        return self.strict_mask(images)
