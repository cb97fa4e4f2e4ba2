_base_ = ["mmdet::masktrack_rcnn/masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py", "./_ifr.py"]

model = dict(detector=dict(roi_head=dict(mask_head=dict(type="IFRFCNMaskHead"))))
