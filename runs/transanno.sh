#!/usr/bin/env bash
# The mouse lung the TransAnno-Net way, without its leaks: merge, preprocess, pretrain without labels, cross-validate on
# whole animals beside other methods, test on a whole study; and what oversampling before the split does to a figure.
#
#     bash runs/transanno.sh OUTPUT [DATA]
#
# DATA holds labelled/mouse/*.h5ad; ../shared/data by default. What is done is kept in OUTPUT: the same command goes on
# from there. Hours of two CPU cores, most of them the folds and seeds. PRESET=transanno takes the paper's own hyper-parameters
# (a Performer over 16,906 genes), for which a GPU is needed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
output=${1:?name a folder}
data=${2:-$here/../../shared/data}
options=(${PRESET:+--preset "$PRESET"})
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$output"
studies=$output/studies

[ -d "$studies" ] || python "$here/../benchmarks/mouse_lung.py" --write "$studies" --data "$data"
[ -f "$output/lung.h5ad" ] || evercell merge "$studies"/[!h]*.h5ad --output "$output/lung.h5ad"
[ -f "$output/clean.h5ad" ] || evercell preprocess "$output/lung.h5ad" --batch source --max-mito 20 \
    --plots "$output/quality.png" --output "$output/clean.h5ad"
[ -d "$output/lung-backbone" ] || evercell pretrain "$output/clean.h5ad" --donor animal --samples "${SAMPLES:-100000}" \
    "${options[@]}" --resume "$output/state" --output "$output/lung-backbone"

echo "== whole animals held out =="
evercell compare "$output/clean.h5ad" --labels cell_type --by donor --donor animal --folds 4 --balance oversample \
    "${options[@]}" --output "$output/compared"
echo "== the same from the lung backbone, which has seen all cells without their labels =="
evercell crossval "$output/clean.h5ad" --labels cell_type --by donor --donor animal --folds 4 --balance oversample \
    "${options[@]}" --from "$output/lung-backbone" --output "$output/pretrained"
echo "== a whole study held out: the atlas of lung development =="
python "$here/../benchmarks/mouse_lung.py" --base "lung=$output/lung-backbone" --seeds 0 1 2 \
    --results "$output/held_out_study.csv"
echo "== the leak: oversampling before the split against after it =="
python "$here/../benchmarks/leak.py" --seeds 0 1 2 --state "$output/leak"
