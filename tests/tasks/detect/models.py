"""Small detectors of mmdet's DETR family, and of transformers'."""

import torch
from torch import nn

from attnzoo.tasks.detect import mmcv_ext

WIDTH = 16
WIDTHS = {"ConditionalDETR": 256}  # mmdet's has that width written into its decoder


def mmdet_config(kind: str) -> dict:
    """DETR, ConditionalDETR or DABDETR: a ResNet of width 8, two encoder layers, two decoder layers, no dropout."""
    width = WIDTHS.get(kind, WIDTH)
    plain: dict = {"embed_dims": width, "num_heads": 2}
    conditional = dict(**plain, attn_drop=0.0, proj_drop=0.0)
    act = {"type": "ReLU", "inplace": True} if kind == "DETR" else {"type": "PReLU"}
    ffn = {"embed_dims": width, "feedforward_channels": 32, "num_fcs": 2, "ffn_drop": 0.0, "act_cfg": act}
    plain |= {"dropout": 0.0, "batch_first": True}
    decoder: dict = {
        "num_layers": 2,
        "layer_cfg": {
            "self_attn_cfg": plain if kind == "DETR" else dict(**conditional, cross_attn=False),
            "cross_attn_cfg": plain if kind == "DETR" else dict(**conditional, cross_attn=True),
            "ffn_cfg": ffn,
        },
        "return_intermediate": True,
    }
    head: dict = {
        "type": f"{kind}Head",
        "num_classes": 3,
        "embed_dims": width,
        "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
        "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
    }
    costs: list[dict] = [{"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"}]
    costs += [{"type": "IoUCost", "iou_mode": "giou", "weight": 2.0}]
    if kind == "DETR":
        head["loss_cls"] = {"type": "CrossEntropyLoss", "bg_cls_weight": 0.1, "loss_weight": 1.0, "class_weight": 1.0}
        costs.append({"type": "ClassificationCost", "weight": 1.0})
    else:
        head["loss_cls"] = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}
        costs.append({"type": "FocalLossCost", "weight": 2.0})
    more: dict = {}
    if kind == "DABDETR":
        decoder |= {"query_dim": 4, "query_scale_type": "cond_elewise", "with_modulated_hw_attn": True}
        more = {"with_random_refpoints": False, "num_patterns": 0}
    return dict(
        type=f"Swapped{kind}",
        num_queries=12,
        data_preprocessor={"type": "DetDataPreprocessor", "mean": [0.0] * 3, "std": [1.0] * 3, "pad_size_divisor": 1},
        backbone={
            "type": "ResNet",
            "depth": 18,
            "num_stages": 3,
            "strides": (1, 2, 2),
            "dilations": (1, 1, 1),
            "out_indices": (2,),
            "base_channels": 8,
            "stem_channels": 8,
            "norm_cfg": {"type": "GN", "num_groups": 4, "requires_grad": True},
            "norm_eval": False,
        },
        neck={
            "type": "ChannelMapper",
            "in_channels": [32],
            "kernel_size": 1,
            "out_channels": width,
            "act_cfg": None,
            "num_outs": 1,
        },
        encoder={"num_layers": 2, "layer_cfg": {"self_attn_cfg": dict(plain), "ffn_cfg": ffn}},
        decoder=decoder,
        positional_encoding={"num_feats": width // 2, "normalize": True},
        bbox_head=head,
        train_cfg={"assigner": {"type": "HungarianAssigner", "match_costs": costs}},
        test_cfg={"max_per_img": 12},
        **more,
    )


def mmdet_detector(kind: str, **options) -> nn.Module:
    mmcv_ext.load("attnzoo.tasks.detect.model")
    mmcv_ext.load("mmengine.registry").init_default_scope("mmdet")
    torch.manual_seed(0)
    return mmcv_ext.load("mmdet.registry").MODELS.build({**mmdet_config(kind), **options}).eval()


def samples(sizes, height, width):
    """What mmdet is told of each image of a padded batch."""
    structures = mmcv_ext.load("mmdet.structures")
    found = []
    for size in sizes:
        sample = structures.DetDataSample()
        sample.set_metainfo(
            {"img_shape": size, "batch_input_shape": (height, width), "ori_shape": size, "scale_factor": (1, 1)}
        )
        found.append(sample)
    return found


def mmdet_call(detector, features, sizes):
    """Encoder and decoder over features ``(B, C, h, w)`` of images of these sizes in tokens; the memory and the states.

    A token is 16 pixels here. The backbone is left out: it sees padding in any detector, whatever its attention.
    """
    height, width = features.shape[-2] * 16, features.shape[-1] * 16
    told = samples([(h * 16, w * 16) for h, w in sizes], height, width)
    kept = {}
    handle = detector.encoder.register_forward_hook(lambda m, i, out: kept.update(memory=out))
    try:
        with torch.no_grad():
            states = detector.forward_transformer((features,), told)["hidden_states"]
    finally:
        handle.remove()
    return kept["memory"], states


def transformers_detector(kind: str) -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    torch.manual_seed(0)
    if kind == "RTDetr":
        backbone.out_features = ["stage2", "stage3", "stage4"]
        config = transformers.RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=WIDTH,
            encoder_in_channels=[8, 16, 16],
            feat_strides=[8, 16, 32],
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=WIDTH,
            num_queries=12,
            decoder_in_channels=[WIDTH] * 3,
            decoder_ffn_dim=32,
            decoder_layers=2,
            decoder_attention_heads=2,
            num_labels=3,
            dropout=0.0,
            num_denoising=0,
        )
        return transformers.RTDetrForObjectDetection(config).eval()
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=12,
        num_labels=3,
        dropout=0.0,
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
