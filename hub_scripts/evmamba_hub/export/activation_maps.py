"""Class-activation maps as a second output of an ONNX file (CAM, Zhou et al., arXiv 1512.04150)."""

from pathlib import Path

from evmamba_hub.errors import UserError, require


OUTPUT = "activation_maps"
NUM_FILTER_AXES = 4  # labels, channels, and a kernel of 1 x 1


def add_activation_maps(file: Path) -> bytes:
    """Return an ONNX file with the output `activation_maps` (B, labels, H, W). Other outputs stay as they are.

    The head is a mean over the cells of the last stage and a linear layer. So the mean of a class's map is its logit
    without the bias. No weights are added. A file whose linear layer is quantized stays as it is.

    Raises:
        UserError: If the file is damaged, or the package onnx is missing.
    """
    require("onnx", extra="export")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import TensorProto, helper

    content = file.read_bytes()
    try:
        model = onnx.load_from_string(content)
    except DecodeError as error:
        raise UserError(f"{file} is damaged: export the model again") from error
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    means = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "ReduceMean"}
    heads = [
        (means[node.input[0]], weights[node.input[1]])
        for node in graph.node
        if node.op_type == "Gemm" and node.input[0] in means and node.input[1] in weights
    ]
    if not heads or any(output.name == OUTPUT for output in graph.output):
        return content
    features, weight = heads[-1]
    shape, filters, maps = (f"{OUTPUT}.{name}" for name in ("shape", "filters", "maps"))
    graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [NUM_FILTER_AXES], [*weight.dims, 1, 1]))
    graph.node.extend(
        [
            helper.make_node("Reshape", [weight.name, shape], [filters]),
            helper.make_node("Conv", [features, filters], [maps]),
            helper.make_node("Cast", [maps], [OUTPUT], to=TensorProto.FLOAT),
        ]
    )
    graph.output.append(
        helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", weight.dims[0], None, None])
    )
    return model.SerializeToString()
