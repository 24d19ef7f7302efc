"""How a signal goes back through each operation: one table, :data:`RULES`.

Zeiler & Fergus (section 2.1) go back through *filter, rectify, pool* by *transposed filter, rectify the
signal, unpool by the switches*. The table extends this to every operation that torchvision's CNNs use:

=============  ===========================================================================
exact          linear operations: the adjoint, no bias; ReLU: g -> max(g, 0);
               max pools and maxima: to where the maximum was
generalised    other rectifiers: as ReLU, also written by hand (a * sigmoid(a)); norms: the statistics
               are constants of the pass, so scale only; contrast normalisation: identity
constant gate  sigmoid(a) * b and the like (clamp(a, 0, c) * b, tanh(a) * b; gelu(a) * b, of two halves;
               a * b and b / a where a is broadcast to b): the gate is a constant, like a switch; so are
               the statistic in a norm written by hand (b / sqrt(a), b * rsqrt(a), b / norm(a),
               b / std(a)), the weights of attention (softmax(a) @ b) and filters computed from the input
gradient       sigmoid and softmax elsewhere (a head): the plain gradient
unsupported    anything else: an error, unless the caller asks for the gradient
=============  ===========================================================================

Only a linear map is the same everywhere, so an operation without a row is never guessed at.

>>> RULES["relu"].kind, RULES["gelu"].kind, rule_of("erfinv").kind
('exact', 'generalised', 'unsupported')
"""

from deconvviz.rules import boxed, gates, linear, maxima, norms, rectifiers
from deconvviz.rules.rule import EXACT, GATE, GENERALISED, GRADIENT, KINDS, UNSUPPORTED, Context, Rule

_ROWS: list[tuple[str, Rule]] = [
    # ── linear: the adjoint ──────────────────────────────────────────────────────────────────────────
    (
        "sub subtract rsub neg negative positive stack hstack vstack dstack view "
        "view_as reshape reshape_as flatten unflatten ravel transpose swapaxes swapdims t T mT permute "
        "movedim moveaxis squeeze unsqueeze contiguous clone getitem setitem narrow select index_select "
        "gather chunk split split_with_sizes tensor_split unbind expand expand_as broadcast_to repeat "
        "repeat_interleave tile flip fliplr flipud roll rot90 pad sum mean cumsum interpolate "
        "pixel_shuffle pixel_unshuffle channel_shuffle unfold fold "
        "masked_fill where tril triu diagonal copy zero fill index_add index_copy overwrite "
        "max_unpool1d max_unpool2d max_unpool3d",
        Rule(EXACT, linear.adjoint, keeps_gate=True, listed=False, classify=linear.linear_kind),
    ),
    (
        "cat concat concatenate",
        Rule(EXACT, linear.adjoint, boxed.joined, keeps_gate=True, listed=False, classify=linear.linear_kind),
    ),
    (
        "add",
        Rule(EXACT, linear.add_back, boxed.add, keeps_gate=True, listed=False, classify=linear.linear_kind),
    ),
    (
        "addcmul addmm baddbmm",
        Rule(EXACT, linear.adjoint, listed=False, classify=linear.fused_kind),
    ),
    (
        "avg_pool1d avg_pool2d avg_pool3d",
        Rule(EXACT, linear.adjoint, boxed.average_back, keeps_gate=True),
    ),
    (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
        Rule(EXACT, linear.adjoint, keeps_gate=True),
    ),
    (
        "conv_transpose1d conv_transpose2d conv_transpose3d mv dot tensordot bilinear grid_sample",
        Rule(EXACT, linear.adjoint, listed=False, classify=linear.product_kind),
    ),
    (
        "conv1d conv2d conv3d",
        Rule(
            EXACT,
            gates.filter_back,
            boxed.filter_back,
            listed=False,
            classify=gates.filter_kind,
            observe=gates.observe_mixing,
        ),
    ),
    ("linear", Rule(EXACT, linear.transposed_matrix, listed=False, classify=linear.product_kind)),
    (
        "to cpu type float double half bfloat16 type_as",
        Rule(EXACT, linear.identity, boxed.pointwise, keeps_gate=True, listed=False),
    ),
    # ── rectifiers: rectify the signal ───────────────────────────────────────────────────────────────
    ("relu", Rule(EXACT, rectifiers.rectify, boxed.pointwise)),
    (
        rectifiers.SMOOTH,
        Rule(GENERALISED, rectifiers.rectify, boxed.pointwise),
    ),
    (
        "rrelu",
        Rule(
            GENERALISED,
            rectifiers.rectify,
            boxed.pointwise,
            observe=gates.observe_random,
            rerun=gates.rerun_random,
        ),
    ),
    (
        "relu6 clamp clip clamp_min hardtanh threshold",
        Rule(
            EXACT,
            rectifiers.rectify,
            boxed.pointwise,
            gate=rectifiers.bounded,
            keeps_gate=True,
            classify=rectifiers.clamp_kind,
        ),
    ),
    # ── pools and maxima: to where the maximum was ───────────────────────────────────────────────────
    (
        "max_pool1d max_pool2d max_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices "
        "adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices",
        Rule(EXACT, maxima.unpool_by_switches, boxed.unpool_by_switches, observe=maxima.observe_pool),
    ),
    ("max amax maximum fmax", Rule(EXACT, maxima.route, keeps_gate=True, observe=maxima.observe_maximum)),
    # ── norms: scale only ────────────────────────────────────────────────────────────────────────────
    (
        "batch_norm",
        Rule(
            EXACT,
            norms.scale,
            boxed.pointwise,
            listed=False,
            classify=norms.batch_norm_kind,
            observe=norms.observe_norm,
            rerun=norms.rerun_norm,
        ),
    ),
    (
        "instance_norm group_norm",
        Rule(GENERALISED, norms.scale, boxed.pointwise, observe=norms.observe_norm, rerun=norms.rerun_norm),
    ),
    (
        "layer_norm rms_norm normalize",
        Rule(GENERALISED, norms.scale, observe=norms.observe_norm, rerun=norms.rerun_norm),
    ),
    ("local_response_norm", Rule(GENERALISED, linear.identity, boxed.pointwise)),
    # ── gates, dropout, heads ────────────────────────────────────────────────────────────────────────
    (
        "mul div divide true_divide",
        Rule(
            EXACT,
            gates.pass_gate,
            boxed.product,
            keeps_gate=True,
            listed=False,
            classify=gates.factor_kind,
            observe=gates.observe_gate,
        ),
    ),
    (
        "matmul mm bmm einsum",
        Rule(EXACT, gates.weigh_back, listed=False, classify=gates.weighted_kind, observe=gates.observe_weights),
    ),
    (
        "scaled_dot_product_attention multi_head_attention_forward",
        Rule(GATE, gates.weigh_back, classify=gates.attention_kind, observe=gates.observe_mixing),
    ),
    ("glu", Rule(GATE, gates.gated_half, observe=gates.observe_glu)),
    (
        "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout",
        Rule(
            EXACT,
            gates.drop,
            boxed.pointwise,
            keeps_gate=True,
            listed=False,
            classify=gates.dropout_kind,
            observe=gates.observe_dropout,
            rerun=gates.rerun_dropout,
        ),
    ),
    (
        "sigmoid hardsigmoid softmax special_expit",
        Rule(GRADIENT, gates.gradient, gate=gates.always, observe=gates.observe_gradient),
    ),
    (
        "tanh erf sqrt rsqrt norm linalg_norm linalg_vector_norm std var",
        Rule(UNSUPPORTED, gates.gradient, gate=gates.always),
    ),
    (
        "pow float_power square",
        Rule(
            UNSUPPORTED,
            rectifiers.rectify,
            boxed.pointwise,
            gate=gates.is_root,
            keeps_gate=True,
            classify=rectifiers.power_kind,
        ),
    ),
    ("reciprocal __rdiv__", Rule(UNSUPPORTED, gates.gradient, keeps_gate=True)),
    ("log_softmax", Rule(GRADIENT, gates.gradient, observe=gates.observe_gradient)),
]

RULES: dict[str, Rule] = {name: rule for names, rule in _ROWS for name in names.split()}

HIDDEN_CODE = "hidden code"
"""What a layer does that no operation shows (NumPy, code that is not PyTorch's): it has no gradient either."""
NO_ROW = Rule(UNSUPPORTED, gates.gradient)
PLAIN_GRADIENT = Rule(GRADIENT, gates.gradient, observe=gates.observe_gradient)
"""What an operation without a rule gets when the caller asks for the gradient."""


def rule_of(operation: str) -> Rule:
    """The row of an operation; one without a row is unsupported."""
    return RULES.get(operation, NO_ROW)


__all__ = [
    "EXACT",
    "GATE",
    "GENERALISED",
    "GRADIENT",
    "HIDDEN_CODE",
    "KINDS",
    "PLAIN_GRADIENT",
    "RULES",
    "UNSUPPORTED",
    "Context",
    "Rule",
    "rule_of",
]
