"""MMDetection, imported as the scripts of detection import it."""

from attnzoo.tasks.detect import mmcv_ext

for name in ("mmengine.runner", "mmdet.apis", "attnzoo.tasks.detect.model", "attnzoo.tasks.detect.hooks"):
    mmcv_ext.load(name)
