"""Models of timm at small sizes, with random weights."""

from __future__ import annotations

from typing import Any

from zoo.harness import Entry
from zoo.tables import labels, normal


def image_model(name: str, size: int = 32, **options: Any) -> Entry:
    """Return the entry of an image classifier of timm; its options make it small."""
    entry = {key: options.pop(key) for key in ("refused", "or_exact", "fault", "rtol", "doubled") if key in options}
    channels = options.get("in_chans", 3)

    def build():
        import timm

        return timm.create_model(name, pretrained=False, num_classes=3, **options)

    return Entry(f"timm {name}", build, lambda: (normal(channels, size, size), labels()), **entry)


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

TIMM_MODELS = [
    image_model("test_vit", 32, img_size=32),
    image_model("test_vit2", 32, img_size=32),
    image_model("test_resnet"),
    image_model("test_byobnet"),
    image_model("test_efficientnet"),
    image_model("test_efficientnet_gn"),
    image_model("test_efficientnet_ln"),
    image_model("test_efficientnet_evos"),
    image_model("test_convnext"),
    image_model("test_convnext2"),
    image_model("test_convnext3"),
    image_model("test_nfnet"),
    image_model("test_mambaout"),
    image_model("vit_tiny_patch16_224", 16, **VIT),
    image_model("vit_relpos_small_patch16_224", 16, **VIT),
    image_model("vit_srelpos_small_patch16_224", 16, **VIT),
    image_model("vit_small_patch16_18x2_224", 16, **VIT),
    image_model("vit_base_patch16_siglip_224", 16, **VIT),
    image_model("deit_tiny_distilled_patch16_224", 16, **VIT),
    image_model("deit3_small_patch16_224", 16, **VIT),
    image_model("beit_base_patch16_224", 16, **VIT),
    image_model("beitv2_base_patch16_224", 16, **VIT),
    image_model("cait_xxs24_224", 16, **VIT),
    image_model("convit_tiny", 16, **VIT),
    image_model("eva02_tiny_patch14_224", 16, **VIT),
    image_model("xcit_nano_12_p8_224", 16, **VIT, doubled=True),
    image_model(
        "swin_tiny_patch4_window7_224",
        32,
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
    ),
    image_model(
        "swinv2_tiny_window8_256",
        32,
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
    ),
    image_model(
        "swinv2_cr_tiny_224", 32, img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2)
    ),
    image_model(
        "levit_128s", 64, img_size=64, embed_dim=(16, 16), key_dim=8, num_heads=(2, 2), depth=(1, 1), doubled=True
    ),
    image_model("pit_ti_224", 32, img_size=32, base_dims=(8, 8), depth=(1, 1), heads=(1, 2), patch_size=8, stride=8),
    image_model("pvt_v2_b0", 32, depths=(1, 1, 1, 1), embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 2, 2)),
    image_model("coat_tiny", 32, img_size=32, embed_dims=(8, 8, 8, 8), serial_depths=(1, 1, 1, 1), parallel_depth=0),
    image_model(
        "tnt_s_legacy_patch16_224",
        32,
        img_size=32,
        embed_dim=16,
        inner_dim=4,
        depth=2,
        num_heads_inner=2,
        num_heads_outer=2,
    ),
    image_model(
        "twins_svt_small",
        32,
        img_size=32,
        embed_dims=(8, 8, 8, 8),
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        wss=(2, 2, 2, 2),
    ),
    image_model("visformer_tiny", 32, img_size=32, embed_dim=16, depth=(1, 1, 1), num_heads=2, init_channels=8),
    image_model("edgenext_xx_small", 32, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), heads=(2, 2, 2, 2)),
    image_model("davit_tiny", 32, depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), window_size=4),
    image_model("lcnet_035", 32),
    image_model("resnetv2_50", 32, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), stem_chs=8),
    image_model("starnet_s050", 32),
    image_model("repvit_m0_9", 32, embed_dim=(8, 8, 16, 16), depth=(1, 1, 1, 1)),
    image_model("fastvit_t8", 32, layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16)),
    image_model(
        "tiny_vit_5m_224",
        32,
        embed_dims=(8, 8, 16, 16),
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_sizes=(2, 2, 2, 2),
    ),
    image_model(
        "hiera_tiny_224",
        32,
        img_size=(32, 32),
        embed_dim=8,
        num_heads=1,
        stages=(1, 1),
        q_pool=1,
        mask_unit_size=(4, 4),
    ),
    image_model(
        "efficientvit_m0",
        64,
        img_size=64,
        embed_dim=(16, 16, 16),
        key_dim=(4, 4, 4),
        num_heads=(2, 2, 2),
        window_size=(4, 4, 4),
        doubled=True,
    ),
    image_model("test_vit_relpos", 32, img_size=32),
    image_model("test_maxvit", 64, img_size=64),
    image_model("test_coatnet", 32, img_size=32),
]
