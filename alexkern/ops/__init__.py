"""AlexNet's ops, called as their counterparts in ``torch.nn.functional``.

Importing this package costs little: no CUDA call, and triton loads with the first kernel.
"""

from alexkern.ops.augment import augment
from alexkern.ops.conv import conv2d_bias_relu
from alexkern.ops.conv_lrn_pool import conv2d_bias_relu_lrn_max_pool2d
from alexkern.ops.dropout import dropout
from alexkern.ops.linear import linear_bias_relu_dropout
from alexkern.ops.lrn import local_response_norm
from alexkern.ops.lrn_pool import lrn_max_pool2d
from alexkern.ops.pool import max_pool2d

__all__ = [
    "augment",
    "conv2d_bias_relu",
    "conv2d_bias_relu_lrn_max_pool2d",
    "dropout",
    "linear_bias_relu_dropout",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
]
