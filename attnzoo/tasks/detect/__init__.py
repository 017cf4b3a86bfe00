"""Detection on MMDetection: what train/detect.py and eval/detect.py share. Beside the host, all that knows mmdet."""
