"""Which cluster of a corpus a text is nearest to, from its token ids and tensors alone.

A text's features are its TF-IDF vector over token ids, l2-normalised, projected (truncated singular value
decomposition) and l2-normalised again; `myriad data cluster` fits the parts. The cluster is the one whose centre is
nearest.

Legend: `E` clusters, `F` features, `V` vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from myriad.models.loss import loss_dtype


class Clusters(nn.Module):
    """The cluster model: TF-IDF over token ids, a projection, centres. Without a fitted one, it is a random one.

    Attributes:
        idf: (V,), the inverse document frequencies.
        components: (F, V), the projection.
        centers: (E, F), of the clusters, among normalised projections.
    """

    idf: Tensor
    components: Tensor
    centers: Tensor

    def __init__(self, vocabulary: int, features: int, clusters: int) -> None:
        super().__init__()
        self.register_buffer("idf", torch.ones(vocabulary))
        self.register_buffer("components", torch.randn(features, vocabulary))
        self.register_buffer("centers", F.normalize(torch.randn(clusters, features), dim=-1))

    def project(self, ids: Tensor) -> Tensor:
        """What one occurrence of each token adds to its text's projection: (..., F).

        A text's projection is the sum of its tokens', up to a factor that its normalisation removes; so features of
        every beginning of a text are running sums, and vectors of V numbers are never made.
        """
        rows = self.components.T[ids] * self.idf[ids].unsqueeze(-1)
        return rows.to(loss_dtype(rows))

    def squared_distances(self, projections: Tensor) -> Tensor:
        """From normalised projections (..., F) to the centres: (..., E). Of no text, the features are zero."""
        features, centers = F.normalize(projections, dim=-1), self.centers.to(projections.dtype)
        squares = features.square().sum(-1, keepdim=True) + centers.square().sum(-1)
        with torch.autocast(features.device.type, enabled=False):
            return squares - 2 * features @ centers.T
