"""Files: data that come along or are fetched (data.py, download.py), folders of pictures (folder.py, layout.py,
decoding.py), pictures of what comes out (pictures.py), models (model.py), checkpoints (checkpoint.py), and what else a
training leaves in its folder (run_folder.py).

tensors.py and replacing.py see to it that a file is whole and sound, or not there, and mistaken.py says what it is
instead; lock.py sees to it that one program at a time is at work in a folder, and quiet.py that no warnings are shown
for a while.
"""
