import torch

from myriad.models.rotary import rotary_angles, rotate


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(at: int, other: int) -> torch.Tensor:
        angles = [rotary_angles(torch.tensor([[position]]), 8, 100.0) for position in (at, other)]
        return (rotate(q, angles[0]) * rotate(k, angles[1])).sum()

    assert torch.allclose(score(3, 1), score(13, 11), rtol=1e-5)
    assert not torch.allclose(score(3, 1), score(3, 2), rtol=1e-3)


def test_rotation_keeps_lengths_and_position_zero():
    x = torch.randn(2, 3, 5, 6)
    angles = rotary_angles(torch.arange(5).expand(2, 5), 6, 10000.0)
    assert torch.allclose(rotate(x, angles).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(rotate(x, angles)[:, :, 0], x[:, :, 0])
