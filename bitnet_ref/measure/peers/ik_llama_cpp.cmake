# The source package ik-llama-cpp-python 0.1.5 lacks a script that its own CMakeLists.txt runs to write build-info.cpp, which
# holds four constants. CMake reads this file at each project() (CMAKE_PROJECT_INCLUDE; see the target bench-peers in the
# Makefile) and puts one there, where none is. Nor do its installed libraries say where the other one lies.
if(APPLE)
  set(CMAKE_INSTALL_RPATH "@loader_path")
else()
  set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()
set(script "${CMAKE_SOURCE_DIR}/vendor/ik_llama.cpp/common/cmake/build-info-gen-cpp.cmake")
if(PROJECT_IS_TOP_LEVEL AND NOT EXISTS "${script}")
  file(WRITE "${script}" [[
set(BUILD_NUMBER 0)
set(BUILD_COMMIT "unknown")
set(BUILD_COMPILER "${CMAKE_C_COMPILER_ID} ${CMAKE_C_COMPILER_VERSION}")
set(BUILD_TARGET "unknown")
configure_file(common/build-info.cpp.in common/build-info.cpp)
]])
endif()
