# A small DAB-DETR, the base of the configs of trees and blood cells: ResNet-18 of half its width up to its third
# stage (16 pixels per token), group normalization, since it is trained from scratch in small batches, 2 encoder layers,
# 3 decoder layers, width 128, no dropout. DAB-DETR and not DETR itself, whose queries take hundreds of epochs to find
# their places.
default_scope = "mmdet"
custom_imports = dict(imports=["attnzoo.tasks.detect.model"])

width, heads = 128, 4
attention = dict(embed_dims=width, num_heads=heads)
perceptron = dict(embed_dims=width, feedforward_channels=4 * width, num_fcs=2, ffn_drop=0.0, act_cfg=dict(type="PReLU"))
model = dict(
    type="SwappedDABDETR",
    num_queries=60,
    with_random_refpoints=True,
    num_patterns=0,
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1,
    ),
    backbone=dict(
        type="ResNet",
        depth=18,
        base_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        norm_cfg=dict(type="GN", num_groups=16, requires_grad=True),
        norm_eval=False,
        style="pytorch",
    ),
    neck=dict(type="ChannelMapper", in_channels=[128], kernel_size=1, out_channels=width, act_cfg=None, num_outs=1),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(self_attn_cfg=dict(**attention, dropout=0.0, batch_first=True), ffn_cfg=perceptron),
    ),
    decoder=dict(
        num_layers=3,
        query_dim=4,
        query_scale_type="cond_elewise",
        with_modulated_hw_attn=True,
        layer_cfg=dict(
            self_attn_cfg=dict(**attention, attn_drop=0.0, proj_drop=0.0, cross_attn=False),
            cross_attn_cfg=dict(**attention, attn_drop=0.0, proj_drop=0.0, cross_attn=True),
            ffn_cfg=perceptron,
        ),
        return_intermediate=True,
    ),
    positional_encoding=dict(num_feats=width // 2, temperature=20, normalize=True),
    bbox_head=dict(
        type="DABDETRHead",
        num_classes=1,
        embed_dims=width,
        sync_cls_avg_factor=True,  # so that the losses do not depend on the number of processes
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0, eps=1e-8),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=60),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=20, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50)]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
)
custom_hooks = [dict(type="SeedEachEpoch")]
randomness = dict(seed=0)
