// Everything that translated PTX is made of.
#pragma once

#include "arithmetic.h"
#include "memory.h"
#include "registers.h"
#include "tensor.h"
#include "warp.h"
