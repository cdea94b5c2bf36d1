#!/usr/bin/env bash
# Adds the plug-in's lines to a checkout of Megatron-LM or of the fork Megatron-DeepSpeed, or takes them out again.
#
#   patches/apply.sh CHECKOUT              add them; where they are already, nothing is done
#   patches/apply.sh CHECKOUT --reverse    take them out: each file is then what it was, byte for byte
#   patches/apply.sh CHECKOUT --check      say what would be done, change nothing (with --reverse too)
#
# Exit status: 0 done, or nothing to do; 2 it cannot be done, and nothing was changed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  printf 'apply.sh: %s\n' "$*" >&2
  exit 2
}

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# What is asked for

checkout='' reverse=no check=no
for argument in "$@"; do
  case $argument in
    --reverse) reverse=yes ;;
    --check) check=yes ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) fail "unknown option $argument; there are --reverse and --check" ;;
    *)
      [ -z "$checkout" ] || fail "one checkout at a time: $checkout or $argument?"
      checkout=$argument
      ;;
  esac
done
[ -n "$checkout" ] || fail "which checkout of Megatron-LM? patches/apply.sh CHECKOUT [--reverse] [--check]"
command -v git >/dev/null || fail "git is needed: the patches are git's"

info=$checkout/megatron/core/package_info.py
[ -f "$info" ] || fail "$checkout is no checkout of Megatron-LM: it has no megatron/core/package_info.py"

number() { # number NAME: the first `NAME = digits` of package_info.py
  sed -n "s/^$1 *= *\([0-9][0-9]*\).*/\1/p" "$info" | head -n 1
}

# The fork calls itself by the number of the Megatron-Core that it once took over.
if grep -qs '^import deepspeed' "$checkout/megatron/arguments.py"; then
  wanted=deepspeed product=Megatron-DeepSpeed
else
  major=$(number MAJOR) minor=$(number MINOR) micro=$(number PATCH)
  [ -n "$major" ] && [ -n "$minor" ] && [ -n "$micro" ] || fail "$info does not say which version this is"
  wanted=$major.$minor product="Megatron-LM $major.$minor.$micro"
fi

# This checkout's lines of expected.txt: its tag, and for each file: names, heads, head_sums, file_sums

known=() tag='' names=() heads=() head_sums=() file_sums=()
while read -r series made_on name head head_sum file_sum; do
  case $series in '#'* | '') continue ;; esac
  [ "$series" = deepspeed ] || known+=("$series")
  [ "$series" = "$wanted" ] || continue
  tag=$made_on
  names+=("$name") heads+=("$head") head_sums+=("$head_sum") file_sums+=("$file_sum")
done <"$here/expected.txt"
[ -n "$tag" ] || fail "$checkout is $product, and there are patches for ${known[*]}. The launcher," \
  "python -m mup_megatron.launch, needs none."
if [ "$wanted" = deepspeed ]; then
  patch=$here/megatron-deepspeed.patch
else
  patch=$here/megatron-lm-${tag#core_v}.patch
fi

# Everything happens on copies. Git must not take them for a part of some repository around them.

work=$(mktemp -d)
beside=() # what lies beside the files of the checkout for a moment
trap 'rm -rf "$work" ${beside[@]+"${beside[@]}"}' EXIT
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
export GIT_CEILING_DIRECTORIES=${work%/*} GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null

sum() {
  sha256sum | cut -d ' ' -f 1
}

is_original() { # is_original INDEX FILE: are the lines around the place of the patch the known ones, nothing in between?
  [ "$(head -n "${heads[$1]}" "$2" | sum)" = "${head_sums[$1]}" ]
}

patched() { # patched INDEX FROM TO [--reverse]: TO becomes FROM with its part of the patch; fails where that does not fit
  local folder name=${names[$1]}
  folder=$(mktemp -d -p "$work") || return 1
  mkdir -p "$(dirname "$folder/$name")" || return 1
  cp "$2" "$folder/$name" || return 1
  git -C "$folder" apply --unidiff-zero --include="$name" "${@:4}" "$patch" 2>/dev/null || return 1
  ! cmp -s "$2" "$folder/$name" || return 1
  mv "$folder/$name" "$3"
}

explain_misfit() { # explain_misfit INDEX REASON
  printf 'apply.sh: %s/%s (%s) is not what the patch expects: %s. Nothing was changed.\n' \
    "$checkout" "${names[$1]}" "$product" "$2" >&2
  if [ "$wanted" = deepspeed ]; then
    printf 'Put this in by hand, between lines %s and %s of the known file:\n' $((heads[$1] - 1)) "${heads[$1]}" >&2
  else
    printf 'The launcher, python -m mup_megatron.launch, needs no patch. Or put this in by hand, before the first import of megatron:\n' >&2
  fi
  sed -n "\\|^+++ b/${names[$1]}\$|,/^---/{ /^+++/d; s/^+\(..*\)/    \1/p; }" "$patch" >&2
  exit 2
}

# What is there: for each file its path, its state, and how to call it

files=() states=() whats=()
for index in "${!names[@]}"; do
  name=${names[index]}
  [ -f "$checkout/$name" ] || fail "$checkout has no $name"
  file=$(readlink -f "$checkout/$name")
  without=$work/$index.without
  line=$(grep -nE '^[[:space:]]*(import|from)[[:space:]]+mup_megatron' "$file" | head -n 1 | cut -d : -f 1) || line=''
  if is_original "$index" "$file"; then
    [ -z "$line" ] || explain_misfit "$index" "it imports mup_megatron in line $line, where this patch does not put it"
    state=original
    without=$file
  elif patched "$index" "$file" "$without" --reverse && is_original "$index" "$without"; then
    state=patched
  elif [ -n "$line" ]; then
    explain_misfit "$index" "it imports mup_megatron in line $line, and the lines around it are not the known ones"
  else
    explain_misfit "$index" "its first ${heads[index]} lines differ from those of $tag"
  fi
  if [ "$(sum <"$without")" = "${file_sums[index]}" ]; then
    what="$checkout/$name ($product, the file of $tag)"
  else
    what="$checkout/$name ($product, changed after line ${heads[index]})"
  fi
  files+=("$file") states+=("$state") whats+=("$what")
done

# What to do about it: `todo`, the files that will change. All of it is known to fit before any of it is done.

todo=()
for index in "${!names[@]}"; do
  what=${whats[index]}
  if [ $reverse = yes ]; then
    [ "${states[index]}" = patched ] || { printf '%s has no patch: nothing to do.\n' "$what"; continue; }
    [ $check = no ] || { printf '%s has the patch, and it can be taken out.\n' "$what"; continue; }
    mv "$work/$index.without" "$work/$index.new"
  else
    [ "${states[index]}" = original ] || { printf '%s has the patch already: nothing to do.\n' "$what"; continue; }
    new=$work/$index.new back=$work/$index.back
    if ! { patched "$index" "${files[index]}" "$new" && patched "$index" "$new" "$back" --reverse &&
      cmp -s "$back" "${files[index]}"; }; then
      fail "$patch does not go into ${files[index]} and out again. Nothing was changed."
    fi
    [ $check = no ] || { printf '%s: the patch fits.\n' "$what"; continue; }
  fi
  todo+=("$index")
done
[ ${#todo[@]} -gt 0 ] || exit 0

# Every new file is complete beside the old one before the first takes its place, so there is always one or the other.
# The old ones stay beside them until all are done: if one cannot be replaced, those before it come back.
for index in "${todo[@]}"; do
  file=${files[index]}
  beside+=("$file.mup-megatron.$$" "$file.mup-megatron.$$.old")
  # The copy gives it the old one's mode and owner.
  { cp -p "$file" "$file.mup-megatron.$$" && cat "$work/$index.new" >"$file.mup-megatron.$$" &&
    { ln "$file" "$file.mup-megatron.$$.old" 2>/dev/null || cp -p "$file" "$file.mup-megatron.$$.old"; }; } ||
    fail "$file could not be written. Nothing was changed."
done
done=()
for index in "${todo[@]}"; do
  file=${files[index]}
  if ! mv -f "$file.mup-megatron.$$" "$file"; then
    for earlier in ${done[@]+"${done[@]}"}; do
      mv -f "${files[earlier]}.mup-megatron.$$.old" "${files[earlier]}"
    done
    fail "$file could not be written. Nothing was changed."
  fi
  done+=("$index")
done
for index in "${todo[@]}"; do
  if [ $reverse = yes ]; then
    printf '%s: the patch is taken out.\n' "${whats[index]}"
  else
    printf '%s: the patch is added. --reverse takes it out again.\n' "${whats[index]}"
  fi
done
