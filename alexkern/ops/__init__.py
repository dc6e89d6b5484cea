"""AlexNet's ops, called as their counterparts in ``torch.nn.functional``.

Importing this package costs little: no CUDA call, and triton loads with the first kernel.
"""

from alexkern.ops.augment import augment
from alexkern.ops.conv import conv2d_bias_relu
from alexkern.ops.dropout import dropout
from alexkern.ops.lrn import local_response_norm
from alexkern.ops.pool import max_pool2d

__all__ = ["augment", "conv2d_bias_relu", "dropout", "local_response_norm", "max_pool2d"]
