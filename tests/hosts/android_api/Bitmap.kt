// Declares what examples/hosts/android uses of Android, so that a compiler without it checks the types.
package android.graphics

interface Bitmap {
    val width: Int
    val height: Int

    fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int)
}
